// Each message has its effect once and in order; what fails is parked, dead-lettered or retried.
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { readFile, readdir } from 'node:fs/promises';
import { afterEach, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import pg from 'pg';
import { Permanent, type Message } from '../src/index.js';
import { DATABASE_URL, Scene, count, randomName, until } from './support.js';

let scene: Scene;
afterEach(() => scene.close());

test('a duplicate has no effect', async () => {
  scene = await Scene.open();
  // As users without exactOptionalPropertyTypes may write it.
  const inbox = scene.start(scene.insert, { concurrency: undefined } as object);
  await scene.send({ id: 'a', key: 'k' }, { id: 'a', key: 'k' }, { id: 'b', key: 'k' },
    { id: 'a' });
  assert.deepEqual(await scene.settled(2, inbox), ['a', 'b']);
  assert.equal(count(inbox, 'handled'), 2);
  assert.equal(count(inbox, 'duplicates'), 2);
});

test('duplicates are recognised without a timestamp too', async () => {
  scene = await Scene.open();
  const inbox = scene.start();
  await scene.send(...['a', 'a', 'b'].map((id) => ({ id, seconds: null })));
  assert.deepEqual((await scene.settled(2, inbox)).sort(), ['a', 'b']);
});

test('a concurrent duplicate waits for the first, and has no effect', async () => {
  scene = await Scene.open();
  let open = (): void => {};
  const gate = new Promise<void>((resolve) => { open = resolve; });
  let begun = false;
  const one = scene.start(async (message, tx) => {
    await scene.insert(message, tx);
    begun = true;
    await gate;
  });
  await scene.send({ id: 'a', key: 'k' });
  await until('the first is being handled', () => begun);
  const two = scene.start(scene.insert);
  await until('both are subscribed', async () =>
    (await scene.channel.checkQueue(scene.queue)).consumerCount === 2);
  await scene.send({ id: 'a', key: 'k' }, { id: 'a', key: 'k' });
  await until('the duplicate waits', async () => (await scene.rows(
    'SELECT FROM pg_stat_activity WHERE application_name = $1 AND wait_event_type = $2',
    [`watership inbox ${scene.name}`, 'Lock'])).length > 0);
  open();
  await until('duplicates', () => count(one, 'duplicates') + count(two, 'duplicates') === 2);
  await one.stop();
  assert.deepEqual(await scene.settled(1, two), ['a']);
});

test('a redelivered message is handled, and its attempt is forgotten with it', async () => {
  scene = await Scene.open();
  await scene.send({ id: 'a', key: 'k' }, { id: 'b', key: 'k' });
  const got = await scene.channel.get(scene.queue);
  assert.ok(got);
  scene.channel.nack(got, false, true);
  await scene.channel.waitForConfirms();
  const inbox = scene.start();
  assert.deepEqual(await scene.settled(2, inbox), ['a', 'b']);
  assert.equal(count(inbox, 'redelivered'), 1);
  assert.deepEqual(await scene.rows('SELECT FROM watership_inbox.unfinished_attempts '
    + 'WHERE consumer = $1', [scene.name]), []);
});

test('what fails a few times is handled then', async () => {
  scene = await Scene.open();
  let left = 3;
  const inbox = scene.start(async (message, tx) => {
    await scene.insert(message, tx);
    if (message.id === 'a' && left-- > 0) throw new Error('not yet');
  });
  await scene.send({ id: 'a', key: 'k' }, { id: 'b', key: 'k' });
  assert.deepEqual(await scene.settled(2, inbox), ['a', 'b']);
  assert.equal(count(inbox, 'failures'), 3);
});

test('what fails always is parked, later ones of its key behind it; a retry handles them in order',
  async () => {
    scene = await Scene.open();
    let isBroken = true;
    const inbox = scene.start(async (message, tx) => {
      await scene.insert(message, tx);
      if (message.id === 'a1' && isBroken) throw new Error('no stock');
    });
    await scene.send({ id: 'a1', key: 'a' }, { id: 'b1', key: 'b' }, { id: 'a2', key: 'a' },
      { id: 'a3', key: 'a' }, { id: 'b2', key: 'b' });
    await until('three are parked', async () => (await scene.parked()).length === 3);
    await until('key b', async () => (await scene.handled()).length === 2);
    assert.deepEqual(await scene.handled(), ['b1', 'b2']);
    const parked = await scene.parked();
    assert.deepEqual(parked.map((p) => [p.message_id, p.reason, p.error]),
      [['a1', 'failed', 'no stock'], ['a2', 'behind', null], ['a3', 'behind', null]]);
    assert.equal(count(inbox, 'failures'), 5);
    assert.equal(count(inbox, 'parked', 'reason="failed"'), 1);
    assert.equal(count(inbox, 'parked', 'reason="behind"'), 2);

    // It fails once more: its key waits for the next retry.
    await scene.rows('SELECT watership_inbox.retry($1, $2)', [scene.name, 'a']);
    await until('a failed retry', async () => (await scene.rows(
      'SELECT FROM watership_inbox.parked_keys WHERE consumer = $1 AND attempts = 1 '
      + 'AND retry_at IS NULL', [scene.name])).length === 1);
    isBroken = false;
    await scene.rows('SELECT watership_inbox.retry($1, $2)', [scene.name, 'a']);
    await until('the retry', async () => (await scene.parked()).length === 0);
    await scene.send({ id: 'a4', key: 'a' }, { id: 'a1', key: 'a' });
    assert.deepEqual(await scene.settled(6, inbox), ['b1', 'b2', 'a1', 'a2', 'a3', 'a4']);
  });

test('a retried message is the one that was delivered', async () => {
  scene = await Scene.open();
  const seen: Message[] = [];
  const inbox = scene.start(async (message, tx) => {
    seen.push(message);
    if (seen.length === 1) throw new Permanent('later');
    await scene.insert(message, tx);
  });
  const headers = { 'ws-key': 'k', traceparent: '00-1-2-01', 'ws-committed-at': 1767323045678901,
    nul: 'a\0b', bytes: Buffer.from([1, 2]), list: [1, { deep: true }], none: null };
  await scene.send({ id: 'a', body: { text: 'zäh\0' },
    options: { headers, type: 'paid', contentType: 'application/json', appId: 'shop' } });
  await until('parked', async () => (await scene.parked()).length === 1);
  assert.equal(count(inbox, 'failures'), 1);
  await scene.rows('SELECT watership_inbox.retry($1, message_id => $2)', [scene.name, 'a']);
  await scene.settled(1, inbox);
  const [first, second] = seen as [Message, Message];
  assert.deepEqual({ ...second, redelivered: false }, { ...first, redelivered: false });
  assert.deepEqual([first.type, first.contentType, first.traceparent, first.headers['nul']],
    ['paid', 'application/json', '00-1-2-01', 'a\uFFFDb']);
  assert.deepEqual([first.headers['ws-committed-at'], first.headers['bytes']],
    [1767323045678901, 'AQI=']);
});

test('an operator discards what is parked, and the key is live again', async () => {
  scene = await Scene.open();
  const inbox = scene.start(async (message, tx) => {
    if (message.id === 'a') throw new Permanent('no');
    await scene.insert(message, tx);
  });
  await scene.send({ id: 'a', key: 'k' });
  await until('parked', async () => (await scene.parked()).length === 1);
  await scene.rows('SELECT watership_inbox.discard($1, $2, $3)', [scene.name, 'spam', 'k']);
  await scene.send({ id: 'b', key: 'k' });
  assert.deepEqual(await scene.settled(1, inbox), ['b']);
});

test('dead letters carry the reason, and are handled when they are moved back', async () => {
  scene = await Scene.open();
  const dead = randomName('dead');
  let isBroken = true;
  const inbox = scene.start(async (message, tx) => {
    if (message.id === 'a' && isBroken) throw new Error(`${'ä'.repeat(600)}\0`);
    await scene.insert(message, tx);
  }, { onFailure: { exchange: '', routingKey: dead } });
  await scene.send({ id: 'a', body: { number: 7 }, options: { type: 'paid', correlationId: 'c',
    headers: { 'ws-key': 'k', 'mine': true, 'CC': ['nowhere'] } } });
  await scene.send({ id: 'b', key: 'k' });
  // Its queue is missing: the message waits, and what is behind it.
  await until('the dead letter is refused', () =>
    scene.logs.some((line) => line.includes('cannot dead-letter')));
  assert.deepEqual(await scene.handled(), []);
  await scene.channel.assertQueue(dead);
  await until('b', async () => (await scene.handled()).length === 1);
  const letter = await scene.channel.get(dead, { noAck: true });
  assert.ok(letter);
  const { headers, ...properties } = letter.properties;
  assert.equal(String(letter.content), '{"number":7}');
  assert.deepEqual([properties.messageId, properties.type, properties.correlationId,
    properties.deliveryMode], ['a', 'paid', 'c', 2]);
  assert.deepEqual(headers, { 'ws-key': 'k', 'mine': true, 'ws-dead-consumer': scene.name,
    'ws-dead-reason': 'failed', 'ws-dead-error': 'ä'.repeat(500), 'ws-dead-failures': 5 });
  assert.equal(count(inbox, 'dead_lettered', 'reason="failed"'), 1);
  assert.deepEqual(await scene.parked(), []);
  isBroken = false;
  scene.channel.sendToQueue(scene.queue, letter.content, letter.properties);
  assert.deepEqual(await scene.settled(2, inbox), ['b', 'a']);
  await scene.channel.deleteQueue(dead);
});

test('a message from before the window is parked, and a retry beyond the window handles it once',
  async () => {
    scene = await Scene.open();
    const inbox = scene.start();
    const seconds = Math.floor(Date.now() / 1000) - 60 * 86_400;
    await scene.send({ id: 'old', key: 'k', seconds }, { id: 'new', key: 'k' },
      { id: 'ms', key: 'm', seconds: Date.now() });
    await until('all are parked', async () => (await scene.parked()).length === 3);
    assert.deepEqual((await scene.parked()).map((p) => [p.message_id, p.reason]).sort(),
      [['ms', 'beyond_tomorrow'], ['new', 'behind'], ['old', 'beyond_window']]);
    assert.equal(count(inbox, 'parked', 'reason="beyond_window"'), 1);
    await scene.rows('SELECT watership_inbox.retry($1, $2, beyond_window => true)',
      [scene.name, 'k']);
    assert.deepEqual(await scene.settled(2, inbox), ['old', 'new']);
  });

test('a message without an id is parked under the hash of its body', async () => {
  scene = await Scene.open();
  const inbox = scene.start();
  for (const messageId of ['', 'a\0b', '']) {
    scene.channel.sendToQueue(scene.queue, Buffer.from(`body of ${messageId}`), { messageId });
  }
  scene.channel.sendToQueue(scene.queue, Buffer.from('none'));
  await scene.send({ id: 'b' });
  await until('the same body', () => count(inbox, 'duplicates') === 1);
  assert.deepEqual(await scene.settled(1, inbox), ['b']);
  const hash = (body: string) => `sha256-${createHash('sha256').update(body).digest('hex')}`;
  assert.deepEqual((await scene.parked()).map((p) => p.message_id).sort(),
    [hash('body of '), hash('body of a\0b'), hash('none')].sort());
  assert.equal(count(inbox, 'parked', 'reason="no_message_id"'), 3);
});

for (const isolation of ['read committed', 'repeatable read', 'serializable']) {
  test(`under ${isolation}, a serialization failure is tried again and not counted`, async () => {
    scene = await Scene.open();
    await scene.rows(`INSERT INTO ${scene.effects} (message_id, number) VALUES ('sum', 0)`);
    let simulated = 2;
    const inbox = scene.start(async (message, tx) => {
      if (message.id === 'm0' && simulated-- > 0) {
        await tx.query("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$");
      }
      await tx.query(`UPDATE ${scene.effects} SET number = number + 1 WHERE message_id = 'sum'`);
      await scene.insert(message, tx);
    }, { concurrency: 2, database: { connectionString: DATABASE_URL,
      options: `-c default_transaction_isolation=${isolation.replace(' ', '\\ ')}` } });
    const ids = Array.from({ length: 20 }, (_, i) => `m${i}`);
    await scene.send(...ids.map((id) => ({ id, key: id })), { id: 'm1', key: 'm1' });
    await scene.settled(21, inbox);
    assert.deepEqual(await scene.rows(`SELECT number FROM ${scene.effects} `
      + "WHERE message_id = 'sum'"), [{ number: 20 }]);
    // Under the others, real ones come to the simulated.
    if (isolation === 'read committed') assert.equal(count(inbox, 'failures'), 0);
    assert.ok(count(inbox, 'retries') >= 2);
    assert.deepEqual(await scene.parked(), []);
  });
}

test('a serialization failure that never ends is a failure', async () => {
  scene = await Scene.open();
  const inbox = scene.start(async (_, tx) => {
    await tx.query("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40P01'; END $$");
  }, { maxFailures: 2 });
  await scene.send({ id: 'a', key: 'k' });
  await until('parked', async () => (await scene.parked()).length === 1);
  await inbox.stop();
  assert.equal(count(inbox, 'retries'), 18);
  assert.equal(count(inbox, 'failures'), 2);
});

test('an ignored error or a COMMIT of the handler is not taken for success', async () => {
  scene = await Scene.open();
  const inbox = scene.start(async (message, tx) => {
    await scene.insert(message, tx);
    if (message.id === 'ignores') await tx.query('SELECT 1 / 0').catch(() => {});
    if (message.id === 'floats') void tx.query('SELECT 1 / 0').catch(() => {});
    if (message.id === 'ends') await tx.query('ROLLBACK');
  }, { maxFailures: 2 });
  await scene.send({ id: 'ignores' }, { id: 'floats' }, { id: 'ends' }, { id: 'fine' });
  await until('all are done', async () => (await scene.parked()).length === 3);
  assert.deepEqual(await scene.settled(1, inbox), ['fine']);
  const said = (await scene.parked()).map(({ message_id: id, error }) =>
    `${id}: ${error.split(':')[0]}`).sort();
  assert.deepEqual(said, ['ends: the handler ended the transaction (COMMIT or ROLLBACK)',
    'floats: the handler hid an error of the database',
    'ignores: the handler hid an error of the database']);
});

test('whatever a handler throws is a failure', async () => {
  scene = await Scene.open();
  const thrown: unknown[] = ['', 0, false, null, undefined, NaN];
  const inbox = scene.start(async (message, tx) => {
    await scene.insert(message, tx);
    if (message.key !== null) throw thrown[Number(message.key)];
  }, { maxFailures: 2 });
  await scene.send(...thrown.map((_, i) => ({ id: `m${i}`, key: String(i) })), { id: 'fine' });
  await until('all are parked', async () => (await scene.parked()).length === thrown.length);
  assert.deepEqual(await scene.settled(1, inbox), ['fine']);
  assert.equal(count(inbox, 'failures'), 2 * thrown.length);
});

for (const how of ["SET LOCAL idle_in_transaction_session_timeout = '100ms'",
  'SELECT pg_terminate_backend(pg_backend_pid())']) {
  test(`a message that costs its handler the connection fails, and others go on: ${how}`,
    async () => {
      scene = await Scene.open();
      const inbox = scene.start(async (message, tx) => {
        if (message.key === 'bad') {
          await tx.query(how);
          await sleep(1_000);
        }
        await scene.insert(message, tx);
      }, { maxFailures: 2, concurrency: 2 });
      const ids = Array.from({ length: 10 }, (_, i) => `m${i}`);
      await scene.send({ id: 'bad', key: 'bad' }, ...ids.map((id) => ({ id, key: 'good' })));
      await until('it is parked', async () => (await scene.parked()).length === 1);
      assert.deepEqual(await scene.settled(10, inbox), ids);
      assert.deepEqual(['retries', 'failures', 'resubscribed'].map((name) => count(inbox, name)),
        [1, 2, 0]);
    });
}

test('a transaction that is still open when its connection is given up reaches no other message',
  async () => {
    scene = await Scene.open();
    let slow = true;
    // The rollbacks time out as well, behind the statement that still runs.
    const database = { connectionString: DATABASE_URL, query_timeout: 600 };
    const inbox = scene.start(async (message, tx) => {
      await scene.insert(message, tx);
      if (slow) {
        slow = false;
        await tx.query('SELECT pg_sleep(2)');
      }
      await scene.insert(message, tx);
    }, { database, concurrency: 1 });
    await scene.send({ id: 'm' });
    assert.deepEqual(await scene.settled(2, inbox), ['m', 'm']);
    assert.equal(count(inbox, 'duplicates'), 0);
  });

test('a conflict that a layer above the driver wrapped is tried again and not counted',
  async () => {
    scene = await Scene.open();
    let simulated = 2;
    const inbox = scene.start(async (message, tx) => {
      await scene.insert(message, tx);
      if (simulated-- <= 0) return;
      await tx.query("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$")
        .catch((cause: unknown) => {
          const query = Object.assign(new Error('query failed', { cause }), { code: 'Q7' });
          throw new Error('cannot save', { cause: query });
        });
    });
    await scene.send({ id: 'a' });
    assert.deepEqual(await scene.settled(1, inbox), ['a']);
    assert.deepEqual([count(inbox, 'retries'), count(inbox, 'failures')], [2, 0]);
  });

test('nothing of a handler that failed is committed, whatever its savepoints', async () => {
  scene = await Scene.open();
  const inbox = scene.start(async (message, tx) => {
    await scene.insert(message, tx);
    await tx.query('SAVEPOINT handler');
    await scene.insert(message, tx);
    throw new Permanent('no');
  });
  await scene.send({ id: 'a', key: 'k' });
  await until('parked', async () => (await scene.parked()).length === 1);
  await inbox.stop();
  assert.deepEqual(await scene.handled(), []);
});

test('nothing is consumed while the inbox is older than the client', async () => {
  scene = await Scene.open();
  const url = new URL(DATABASE_URL);
  await scene.rows(`CREATE DATABASE "${scene.name}"`);
  url.pathname = scene.name;
  const db = new pg.Client(url.href);
  await db.connect();
  const sql = new URL('../../../../sql/inbox/', import.meta.url);
  const files = (await readdir(sql)).sort();
  // The newest one whose functions are called.
  const at = files.indexOf('0005_messages.sql');
  const install = async (file: string) => db.query(await readFile(new URL(file, sql), 'utf8'));
  for (const file of files.slice(0, at)) await install(file);
  const handled: string[] = [];
  const inbox = scene.start(({ id }) => { handled.push(id); }, { database: url.href });
  await scene.send({ id: 'a' });
  await until('it says so more than once', () =>
    scene.logs.filter((line) => line.includes('run watership inbox install')).length > 1);
  assert.equal(scene.logs.filter((line) => /subscribed|unreachable/.test(line)).length, 0);
  for (const file of files.slice(at)) await install(file);
  await until('a', () => handled.length === 1);
  await inbox.stop();
  await db.end();
  await scene.rows(`DROP DATABASE "${scene.name}" WITH (FORCE)`);
});

test('a key is handled in order and one at a time, keys are side by side', async () => {
  scene = await Scene.open();
  const running = new Map<string, number>();
  let most = 0;
  const inbox = scene.start(async (message, tx) => {
    const key = message.key ?? '';
    assert.equal(running.get(key) ?? 0, 0);
    running.set(key, 1);
    most = Math.max(most, [...running.values()].filter(Boolean).length);
    await scene.insert(message, tx);
    await tx.query('SELECT pg_sleep(0.01)');
    running.set(key, 0);
    if (Math.random() < 0.1) throw new Error('now and then');
  }, { concurrency: 3, maxFailures: 50 });
  const ids = Array.from({ length: 60 }, (_, i) => `${i % 6}-${String(i).padStart(2, '0')}`);
  await scene.send(...ids.map((id) => ({ id, key: `k${id[0]}` })));
  const handled = await scene.settled(60, inbox);
  for (const key of '012345') {
    const mine = handled.filter((id) => id.startsWith(key));
    assert.deepEqual(mine, [...mine].sort());
  }
  assert.equal(most, 3);
});
