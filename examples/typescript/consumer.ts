// A complete consumer: one row for each message, once, in the order of its key.
//
// It reads AMQP_URL, DATABASE_URL, QUEUE, CONSUMER and ORDERED ("true" for a queue with
// x-single-active-consumer), and runs until SIGTERM. QUEUE may name several queues, separated by
// commas: the partitions of a route, each of which has its own keys. `watership inbox torture` can
// start it.
import { Inbox, type Handler } from 'watership';

function setting(name: string): string {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set`);
  return value;
}

const queues = setting('QUEUE').split(',');
// Partitions run side by side, so each of them does with one connection to the database. To share
// them among processes, subscribe to those of this process first: docs/consuming.md.
const inboxes = queues.map((queue) => new Inbox(setting('CONSUMER'), {
  amqp: setting('AMQP_URL'),
  database: setting('DATABASE_URL'),
  queue,
  concurrency: queues.length === 1 ? 8 : 1,
  ordered: process.env['ORDERED'] === 'true',
}));
const stop = (): void => inboxes.forEach((inbox) => void inbox.stop());
process.once('SIGTERM', stop);
process.once('SIGINT', stop);

const handle: Handler = async (message, tx) => {
  const { key, number } = message.json<{ key: string; number: number }>();
  await tx.query(
    'INSERT INTO watership_torture.effect (message_id, key, number) VALUES ($1, $2, $3)',
    [message.id, key, number],
  );
};
await Promise.all(inboxes.map((inbox) => inbox.run(handle)));
