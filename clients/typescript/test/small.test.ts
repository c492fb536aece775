// The small pieces alone, on the caller's own client.
import assert from 'node:assert/strict';
import { readFile, readdir } from 'node:fs/promises';
import { after, before, test } from 'node:test';
import type { ConsumeMessage } from 'amqplib';
import pg from 'pg';
import { claim, claimMany, emit, forget, park, parseMessage, receive } from '../src/index.js';
import { DATABASE_URL, randomName } from './support.js';

const db = new pg.Client(DATABASE_URL);
const consumer = randomName('ts');

before(async () => {
  await db.connect();
  await db.query("SELECT pg_advisory_lock(hashtext('watership: sql for tests'))");
  const { rows: [row] } = await db.query("SELECT to_regnamespace('watership') IS NULL AS missing");
  const sql = new URL('../../../../sql/', import.meta.url);
  for (const file of row.missing ? (await readdir(sql)).sort() : []) {
    if (/^0\d+_.*\.sql$/.test(file)) await db.query(await readFile(new URL(file, sql), 'utf8'));
  }
});
after(() => db.end());

function delivery(properties: object, fields: object = {}): ConsumeMessage {
  return { content: Buffer.from('{"id": 7}'), properties: { headers: {}, ...properties },
    fields: { exchange: 'shop', routingKey: 'order.paid', redelivered: false, ...fields },
  } as unknown as ConsumeMessage;
}

test('a delivery is read with its id, time, key, position and trace', () => {
  const message = parseMessage(delivery({ messageId: 'a', timestamp: 1767323045, type: 'paid',
    contentType: 'application/json', headers: { 'ws-key': 'order/7', 'ws-position': '00-1',
      'ws-committed-at': 1767323045678901, traceparent: '00-1-2-01', 'x-delivery-count': 2 } },
  { redelivered: true }));
  assert.deepEqual([message.id, message.hasId, message.key, message.position, message.type,
    message.contentType, message.traceparent, message.deliveryCount, message.redelivered],
  ['a', true, 'order/7', '00-1', 'paid', 'application/json', '00-1-2-01', 2, true]);
  assert.equal(message.time?.toISOString(), '2026-01-02T03:04:05.000Z');
  assert.deepEqual(message.json(), { id: 7 });
  assert.equal(message.headers['ws-committed-at'], 1767323045678901);
  assert.equal(message.properties['routing_key'], 'order.paid');
});

test('a delivery without properties has an id of its body, and no time and key', () => {
  const message = parseMessage(delivery({ headers: undefined }));
  assert.equal(message.id,
    'sha256-ad559f4e2220ee7317330787fe05a065f5a22e4a1ca866b4f480553939f553e2');
  assert.deepEqual([message.hasId, message.time, message.key, message.headers],
    [false, null, null, {}]);
});

test('headers that JSON does not have are read as JSON that Postgres stores', () => {
  const { headers, key, time } = parseMessage(delivery({ timestamp: 2 ** 62, headers: {
    'ws-key': 7, at: { '!': 'timestamp', value: 5 }, nan: NaN, bytes: Buffer.from('x'),
    'a\0': ['\0', { x: null }] } }));
  assert.deepEqual(headers,
    { 'ws-key': 7, at: 5, nan: 'NaN', bytes: 'eA==', 'a\uFFFD': ['\uFFFD', { x: null }] });
  assert.equal(key, '7');
  assert.equal(time?.getUTCFullYear(), 9999);
});

test('claim is true once, by the UTC day of the time', async () => {
  const day = new Date().toISOString().slice(0, 10);
  await db.query("SET TIME ZONE 'Pacific/Kiritimati'");
  assert.equal(await claim(db, consumer, 'a', new Date(`${day}T00:00:00Z`)), true);
  await db.query("SET TIME ZONE 'Pacific/Pago_Pago'");
  assert.equal(await claim(db, consumer, 'a', new Date(`${day}T23:59:59.999Z`)), false);
  await db.query('RESET TIME ZONE');
  assert.equal(await claim(db, consumer, 'b', null), true);
  assert.equal(await claim(db, consumer, 'b', null), false);
});

test('claim tells by SQLSTATE what is beyond the window, and another body', async () => {
  await assert.rejects(claim(db, consumer, 'c', new Date(0)), { code: 'WI001' });
  await assert.rejects(claim(db, consumer, 'c', new Date('2999-01-01')), { code: 'WI002' });
  const [one, other] = [Buffer.from([1]), Buffer.from([2])];
  assert.equal(await claim(db, consumer, 'c', new Date(), { bodyHash: one }), true);
  await assert.rejects(claim(db, consumer, 'c', new Date(), { bodyHash: other, strict: true }),
    { code: 'WI004' });
});

test('claimMany returns the new ones, each once', async () => {
  const time = new Date();
  assert.equal(await claim(db, consumer, 'm1', time), true);
  const ids = ['m1', 'm2', 'm2', 'm"3,\\{}'];
  const claimed = await claimMany(db, consumer, ids.map((id) => ({ id, time })));
  assert.deepEqual(claimed.sort(), ['m"3,\\{}', 'm2']);
  assert.deepEqual(await claimMany(db, consumer, []), []);
});

test('forget lets a message have its effect once more', async () => {
  await claim(db, consumer, 'f', new Date());
  assert.equal(await forget(db, consumer, 'f'), true);
  assert.equal(await forget(db, consumer, 'f'), false);
  assert.equal(await claim(db, consumer, 'f', new Date()), true);
});

test('receive and park keep a key in order', async () => {
  const message = (messageId: string) => parseMessage(delivery({ messageId,
    timestamp: Math.floor(Date.now() / 1000), headers: { 'ws-key': 'p' } }));
  assert.equal(await receive(db, consumer, message('p1')), 'handle');
  assert.equal(await receive(db, consumer, message('p1')), 'duplicate');
  assert.equal(await park(db, consumer, message('p2'), 'failed', 'why'), true);
  assert.equal(await park(db, consumer, message('p1'), 'failed', null), false);
  assert.equal(await receive(db, consumer, message('p3')), 'parked');
});

test('emit writes the event within the transaction', async () => {
  const key = randomName('order');
  await db.query('BEGIN');
  await emit(db, { aggregateType: key, aggregateId: 1, eventType: 'gone', payload: {} });
  await db.query('ROLLBACK');
  const id = '7f1b0a52-7c0e-4d9b-9a3e-' + key.slice(-12);
  const big = 9007199254740993n;
  assert.equal(await emit(db, { aggregateType: key, aggregateId: big, eventType: 'paid', id,
    payload: { total: '12.50', zäh: [null] },
    headers: { big, flag: true, text: 'a"b', none: null, traceparent: '00-1-2-01' } }), id);
  await emit(db, { aggregateType: key, aggregateId: 'x', eventType: 'raw', json: '{ "a":1.0 }' });
  await emit(db, { aggregateType: key, aggregateId: 2, eventType: 'bytes',
    data: new Uint8Array([0, 255]), contentType: 'image/png' });
  const { rows } = await db.query('SELECT aggregate_id, event_type, payload::text, data, '
    + 'content_type, headers::text, traceparent FROM watership.outbox WHERE aggregate_type = $1 '
    + 'ORDER BY seq', [key]);
  const nothing =
    { payload: null, data: null, content_type: null, headers: null, traceparent: null };
  assert.deepEqual(rows, [
    { ...nothing, aggregate_id: String(big), event_type: 'paid', traceparent: '00-1-2-01',
      payload: '{"total":"12.50","zäh":[null]}',
      headers: `{"big": ${big}, "flag": true, "none": null, "text": "a\\"b"}` },
    { ...nothing, aggregate_id: 'x', event_type: 'raw', payload: '{ "a":1.0 }' },
    { ...nothing, aggregate_id: '2', event_type: 'bytes', data: Buffer.from([0, 255]),
      content_type: 'image/png' },
  ]);
});

test('emit refuses a number that is not the one that was meant', async () => {
  const event = { aggregateType: 'order', eventType: 'paid', payload: {} };
  await assert.rejects(emit(db, { ...event, aggregateId: 2 ** 53 }), TypeError);
  await assert.rejects(emit(db, { ...event, aggregateId: 0.5 }), TypeError);
});
