// A consumer that other processes start and kill. The body says what to do: { "die": true } kills
// the process at once, { "slow": true } is what is being handled meanwhile.
import { Inbox } from '../src/index.js';

const { AMQP_URL = '', DATABASE_URL = '', QUEUE = '', CONSUMER = '', ORDERED, TABLE } = process.env;
const inbox = new Inbox(CONSUMER, { amqp: AMQP_URL, database: DATABASE_URL, queue: QUEUE,
  ordered: ORDERED === 'true', maxKills: 4 });
process.once('SIGTERM', () => void inbox.stop());
process.send?.('ready', () => process.disconnect());
await inbox.run(async (message, tx) => {
  const { number = null, die, slow } =
    message.json<{ number?: number; die?: boolean; slow?: boolean }>();
  await tx.query(`INSERT INTO ${TABLE} (message_id, key, number) VALUES ($1, $2, $3)`,
    [message.id, message.key, number]);
  if (die) process.kill(process.pid, 'SIGKILL');
  if (slow) await tx.query('SELECT pg_sleep(0.2)');
});
