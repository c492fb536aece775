// Processes are killed at random, and by their messages.
import assert from 'node:assert/strict';
import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { afterEach, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { AMQP_URL, DATABASE_URL, Scene, until } from './support.js';

let scene: Scene;
let isOver = false;
const children = new Set<ChildProcess>();
/** Those that know what to do at SIGTERM. */
const ready = new Set<ChildProcess>();
afterEach(async () => {
  isOver = true;
  await Promise.all([...children].map(async (child) => {
    const exit = once(child, 'exit');
    child.kill('SIGKILL');
    await exit;
  }));
  await scene.close();
});

/** Starts the consumer, and again whenever it dies. */
function start(ordered: boolean): void {
  const child = spawn(process.execPath, [fileURLToPath(new URL('child.js', import.meta.url))], {
    stdio: ['ignore', 'inherit', 'ignore', 'ipc'], env: { ...process.env, AMQP_URL, DATABASE_URL,
      QUEUE: scene.queue, CONSUMER: scene.name, ORDERED: String(ordered), TABLE: scene.effects } });
  children.add(child);
  child.once('message', () => ready.add(child));
  child.once('exit', (code) => {
    children.delete(child);
    if (!isOver && code !== 0) start(ordered);
  });
}

async function stop(): Promise<void> {
  await Promise.all([...children].map(async (child) => {
    await until('the consumer has begun', async () => ready.has(child));
    const exit = once(child, 'exit');
    child.kill('SIGTERM');
    assert.deepEqual(await exit, [0, null]);
  }));
}

const QUEUES = {
  'a quorum queue with a single active consumer': { ordered: true, arguments: {
    'x-queue-type': 'quorum', 'x-single-active-consumer': true, 'x-delivery-limit': 1000 } },
  'a classic queue with competing consumers': { ordered: false, arguments: {} },
};

for (const [name, { ordered, arguments: args }] of Object.entries(QUEUES)) {
  test(`random kills of three consumers of ${name}: each effect once, keys in order`, async () => {
    isOver = false;
    scene = await Scene.open({ arguments: args });
    const messages = Array.from({ length: 800 }, (_, i) => ({ id: `m${i}`, key: `k${i % 40}`,
      body: { key: `k${i % 40}`, number: Math.floor(i / 40) } }));
    // Some come twice, soon or later.
    const late = messages.filter((_, i) => i % 7 === 0);
    await scene.send(...messages.flatMap((m, i) => i % 5 === 0 ? [m, m] : [m]), ...late);
    for (let i = 0; i < 3; i += 1) start(ordered);
    // Each kill comes after some progress, so that a slow machine finishes too.
    for (let kills = 0, next = 0; kills < 12; kills += 1) {
      next += Math.floor(Math.random() * messages.length / 12);
      await until('progress', async () => (await scene.handled()).length >= next);
      const victims = [...children];
      victims[Math.floor(Math.random() * victims.length)]?.kill('SIGKILL');
    }
    await until('all effects', async () => (await scene.handled()).length >= messages.length);
    await until('the queue is empty', async () =>
      (await scene.channel.checkQueue(scene.queue)).messageCount === 0);
    await stop();
    // What a process held when it stopped is back in the queue: duplicates of what was handled.
    assert.deepEqual((await scene.handled()).sort(), messages.map((m) => m.id).sort());
    assert.deepEqual(await scene.parked(), []);
    if (ordered) {
      assert.deepEqual(await scene.rows(`SELECT key, number FROM (SELECT key, number,
        lag(number) OVER (PARTITION BY key ORDER BY seq) AS before FROM ${scene.effects}) AS e
        WHERE number <= before`), []);
    }
  });
}

test('a message that kills the process is parked, and no other; other keys are handled meanwhile',
  async () => {
    isOver = false;
    scene = await Scene.open({ arguments: { 'x-queue-type': 'quorum', 'x-delivery-limit': 1000 } });
    const messages = Array.from({ length: 60 }, (_, i) =>
      ({ id: `m${i}`, key: `k${i % 10}`, body: { slow: i < 10 } }));
    await scene.send(...messages.slice(0, 5), { id: 'poison', key: 'p', body: { die: true } },
      { id: 'behind', key: 'p' }, ...messages.slice(5));
    start(false);
    await until('the rest is handled', async () => (await scene.handled()).length >= 60);
    await until('it is parked', async () => (await scene.parked()).length === 2);
    const parked = await scene.parked();
    assert.deepEqual(parked.map((p) => [p.message_id, p.reason]),
      [['poison', 'killed'], ['behind', 'behind']]);
    await stop();
    assert.deepEqual((await scene.handled()).sort(), messages.map((m) => m.id).sort());

    // Its retry kills as well, and then it waits for the next one.
    await scene.rows('SELECT watership_inbox.retry($1, $2)', [scene.name, 'p']);
    start(false);
    await until('the retry is given up', async () => (await scene.rows('SELECT FROM '
      + 'watership_inbox.parked_keys WHERE consumer = $1 AND attempts = 1 AND retry_at IS NULL',
    [scene.name])).length === 1);
    await scene.send({ id: 'last', key: 'k1' });
    await until('the last one', async () => (await scene.handled()).includes('last'));
    await stop();
  });
