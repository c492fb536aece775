// A complete consumer: one row for each message, once, in the order of its key.
//
// It reads AMQP_URL, DATABASE_URL, QUEUE, CONSUMER and ORDERED ("true" for a queue with
// x-single-active-consumer), and runs until SIGTERM. `watership inbox torture` can start it.
import { Inbox } from 'watership';

function setting(name: string): string {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set`);
  return value;
}

const inbox = new Inbox(setting('CONSUMER'), {
  amqp: setting('AMQP_URL'),
  database: setting('DATABASE_URL'),
  queue: setting('QUEUE'),
  ordered: process.env['ORDERED'] === 'true',
});
process.once('SIGTERM', () => void inbox.stop());
process.once('SIGINT', () => void inbox.stop());

await inbox.run(async (message, tx) => {
  const { key, number } = message.json<{ key: string; number: number }>();
  await tx.query(
    'INSERT INTO watership_torture.effect (message_id, key, number) VALUES ($1, $2, $3)',
    [message.id, key, number],
  );
});
