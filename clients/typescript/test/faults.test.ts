// Whatever is lost, on either side, the consumer comes back by itself and loses nothing.
import assert from 'node:assert/strict';
import { afterEach, test } from 'node:test';
import { DATABASE_URL, Proxy, Scene, count, until } from './support.js';

let scene: Scene;
let proxy: Proxy | undefined;
afterEach(async () => {
  await scene.close();
  await proxy?.close();
  proxy = undefined;
});

const subscribed = (times: number) => until(`${times} subscriptions`, () =>
  scene.logs.filter((line) => line.startsWith('info subscribed')).length >= times);
const backends = (name: string) => scene.rows('SELECT pg_terminate_backend(pid) '
  + 'FROM pg_stat_activity WHERE application_name = $1', [`watership inbox ${name}`]);

test('a deleted queue is consumed again when it is back', async () => {
  scene = await Scene.open();
  const inbox = scene.start();
  await scene.send({ id: 'a' });
  await until('a', async () => (await scene.handled()).length === 1);
  await scene.channel.deleteQueue(scene.queue);
  await until('the cancel', () => count(inbox, 'resubscribed', 'cause="cancelled"') === 1);
  await until('it waits', () => scene.logs.some((line) => line.includes('cannot consume yet')));
  await scene.channel.assertQueue(scene.queue);
  await scene.send({ id: 'b' });
  assert.deepEqual(await scene.settled(2, inbox), ['a', 'b']);
});

test('the consumer waits for a queue that is not there at the start', async () => {
  scene = await Scene.open();
  await scene.channel.deleteQueue(scene.queue);
  const inbox = scene.start();
  await until('it waits', () => scene.logs.some((line) => line.includes('cannot consume yet')));
  await scene.channel.assertQueue(scene.queue);
  await scene.send({ id: 'a' });
  assert.deepEqual(await scene.settled(1, inbox), ['a']);
});

test('a channel that the broker closes is opened again, and messages in hand come again',
  async () => {
    scene = await Scene.open();
    proxy = new Proxy();
    let open = (): void => {};
    const gate = new Promise<void>((resolve) => { open = resolve; });
    let begun = false;
    const inbox = scene.start(async (message, tx) => {
      await scene.insert(message, tx);
      begun = true;
      if (message.id === 'a') await gate;
    }, { amqp: await proxy.listen() });
    await scene.send({ id: 'a', key: 'k' }, { id: 'b', key: 'k' });
    await until('a is being handled', () => begun);
    await subscribed(1);
    // basic.ack of a tag that was never sent, on channel 1: the broker closes the channel.
    const ack = '01 0001 0000000d 003c 0050 00000000000f4240 00 ce';
    proxy.inject(Buffer.from(ack.replaceAll(' ', ''), 'hex'));
    await until('the loss', () => count(inbox, 'resubscribed', 'cause="channel_closed"') === 1);
    await subscribed(2);
    open();
    assert.deepEqual(await scene.settled(2, inbox), ['a', 'b']);
    assert.equal(count(inbox, 'handled'), 2);
    assert.equal(count(inbox, 'duplicates'), 1);
  });

test('a connection that breaks is opened again', async () => {
  scene = await Scene.open();
  proxy = new Proxy();
  const inbox = scene.start(scene.insert, { amqp: await proxy.listen() });
  for (let i = 0; i < 3; i += 1) {
    await subscribed(i + 1);
    await scene.send({ id: `before-${i}` });
    proxy.cut();
    await scene.send({ id: `after-${i}` });
  }
  await scene.settled(6, inbox);
  assert.equal(count(inbox, 'resubscribed', 'cause="connection_lost"'), 3);
  assert.equal(count(inbox, 'handled'), 6);
});

test('a connection that is open and dead is given up by its heartbeats', async () => {
  scene = await Scene.open();
  proxy = new Proxy();
  const inbox = scene.start(scene.insert, { amqp: await proxy.listen() });
  await scene.send({ id: 'a' });
  await until('a', async () => (await scene.handled()).length === 1);
  proxy.freeze();
  await scene.send({ id: 'b' });
  assert.deepEqual(await scene.settled(2, inbox), ['a', 'b']);
  assert.equal(count(inbox, 'resubscribed', 'cause="connection_lost"'), 1);
});

test('the watchdog finds a consumer that the broker does not know any more', async () => {
  scene = await Scene.open();
  proxy = new Proxy();
  // basic.cancel never arrives.
  proxy.drops = (frame) => frame[0] === 1 && frame.readUInt32BE(7) === 0x003c001e;
  const inbox = scene.start(scene.insert, { amqp: await proxy.listen(), watchdog: 200 });
  await subscribed(1);
  await scene.channel.deleteQueue(scene.queue);
  await scene.channel.assertQueue(scene.queue);
  await scene.send({ id: 'a' });
  assert.deepEqual(await scene.settled(1, inbox), ['a']);
  assert.ok(count(inbox, 'resubscribed', 'cause="watchdog"') >= 1);
});

test('the watchdog subscribes an idle consumer again, and one that has work is left alone',
  async () => {
    scene = await Scene.open({ arguments: { 'x-single-active-consumer': true } });
    let open = (): void => {};
    const gate = new Promise<void>((resolve) => { open = resolve; });
    const options = { ordered: true, watchdog: 100, watchdogIdle: 300 };
    const active = scene.start(async (message, tx) => {
      await scene.insert(message, tx);
      await gate;
    }, options);
    await subscribed(1);
    await scene.send({ id: 'a', key: 'k' }, { id: 'b', key: 'k' }, { id: 'c', key: 'k' });
    const waiting = scene.start(scene.insert, options);
    await until('the watchdog', () => count(waiting, 'resubscribed', 'cause="watchdog"') >= 2);
    assert.equal(count(active, 'resubscribed'), 0);
    open();
    const stopped = active.stop();
    assert.deepEqual(await scene.settled(3, waiting), ['a', 'b', 'c']);
    await stopped;
  });

test('terminated database connections lose nothing, and no message is parked for them', async () => {
  scene = await Scene.open();
  let running = 0;
  const inbox = scene.start(async (message, tx) => {
    running += 1;
    try {
      await scene.insert(message, tx);
      await tx.query('SELECT pg_sleep(0.05)');
    } finally {
      running -= 1;
    }
  }, { prefetch: 5, concurrency: 4 });
  const ids = Array.from({ length: 300 }, (_, i) => `m${i}`);
  await scene.send(...ids.map((id, i) => ({ id, key: `k${i % 6}` })));
  const losses = (): number => count(inbox, 'resubscribed', 'cause="database"')
    + count(inbox, 'retries') + count(inbox, 'failures');
  for (let i = 0; i < 4; i += 1) {
    const before = losses();
    await until('work', () => running > 1);
    await backends(scene.name);
    await until('the loss', () => losses() > before);
  }
  assert.deepEqual((await scene.settled(300, inbox)).sort(), [...ids].sort());
  assert.deepEqual(await scene.parked(), []);
});

test('while the database is away the queue keeps its messages', async () => {
  scene = await Scene.open();
  const database = new URL(DATABASE_URL);
  const role = scene.name;
  await scene.rows(`CREATE ROLE "${role}" LOGIN PASSWORD 'x' IN ROLE watership_consumer`);
  await scene.rows(`GRANT INSERT ON ${scene.effects} TO "${role}"`);
  await scene.rows(`GRANT USAGE ON SEQUENCE ${scene.effects}_seq_seq TO "${role}"`);
  database.username = role;
  database.password = 'x';
  const inbox = scene.start(scene.insert, { database: database.href });
  await scene.send({ id: 'a' });
  await until('a', async () => (await scene.handled()).length === 1);
  await scene.rows(`ALTER ROLE "${role}" NOLOGIN`);
  await backends(scene.name);
  await scene.send({ id: 'b' });
  await until('it cannot log in', () =>
    scene.logs.filter((line) => line.includes('cannot consume yet')).length > 2);
  const { messageCount, consumerCount } = await scene.channel.checkQueue(scene.queue);
  assert.deepEqual({ messageCount, consumerCount }, { messageCount: 1, consumerCount: 0 });
  await scene.rows(`ALTER ROLE "${role}" LOGIN`);
  assert.deepEqual(await scene.settled(2, inbox), ['a', 'b']);
  assert.equal(count(inbox, 'failures'), 0);
  await scene.rows(`DROP OWNED BY "${role}"`);
  await scene.rows(`DROP ROLE "${role}"`);
});

test('a stop lets the running handler end and begins no other message', async () => {
  scene = await Scene.open();
  let open = (): void => {};
  const gate = new Promise<void>((resolve) => { open = resolve; });
  let begun = 0;
  const inbox = scene.start(async (message, tx) => {
    begun += 1;
    await gate;
    await scene.insert(message, tx);
  });
  await scene.send({ id: 'a', key: 'k' }, { id: 'b', key: 'k' });
  await until('a', () => begun === 1);
  const stopped = inbox.stop();
  open();
  await stopped;
  assert.equal(begun, 1);
  assert.deepEqual(await scene.handled(), ['a']);
  const { messageCount } = await scene.channel.checkQueue(scene.queue);
  assert.equal(messageCount, 1);
});

test('a stop does not wait for a handler beyond its limit, and rolls it back', async () => {
  scene = await Scene.open();
  let begun = 0;
  const inbox = scene.start(async (message, tx) => {
    await scene.insert(message, tx);
    begun += 1;
    await new Promise(() => {});
  }, { stopTimeout: 50 });
  await scene.send({ id: 'a' });
  await until('a', () => begun === 1);
  await inbox.stop();
  assert.deepEqual(await scene.handled(), []);
  const next = scene.start();
  assert.deepEqual(await scene.settled(1, next), ['a']);
});

test('a stop ends a wait for the next attempt', async () => {
  scene = await Scene.open();
  const inbox = scene.start(() => { throw new Error('not yet'); },
    { backoff: 1e9, maxBackoff: 1e9 });
  await scene.send({ id: 'a' });
  await until('a failure', () => count(inbox, 'failures') === 1);
  await inbox.stop();
  assert.equal(count(inbox, 'failures'), 1);
  const next = scene.start();
  assert.deepEqual(await scene.settled(1, next), ['a']);
});
