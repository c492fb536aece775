// What the tests share: a broker, a database, a consumer of their own, and a proxy that breaks
// connections.
import { randomBytes } from 'node:crypto';
import net from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import amqp, { type ChannelModel, type ConfirmChannel, type Options } from 'amqplib';
import pg from 'pg';
import { Inbox, type Handler, type InboxOptions } from '../src/index.js';

function wanted(name: string): string {
  const value = process.env[name];
  if (!value) {
    throw new Error(`${name} is not set: the tests need AMQP_URL, a RabbitMQ vhost, and `
      + 'DATABASE_URL, a Postgres database with sql/inbox installed');
  }
  return value;
}
export const AMQP_URL = wanted('AMQP_URL');
export const DATABASE_URL = wanted('DATABASE_URL');

export const randomName = (what: string): string => `${what}-${randomBytes(6).toString('hex')}`;

export async function until(what: string, isSo: () => Promise<boolean> | boolean): Promise<void> {
  const deadline = Date.now() + 180_000;
  while (!await isSo()) {
    if (Date.now() > deadline) throw new Error(`still waiting: ${what}`);
    await sleep(20);
  }
}

export interface Sent { id?: string; key?: string; body?: unknown; seconds?: number | null;
  options?: Options.Publish }

/** A queue, a consumer name and a table of effects, gone at the end of the test. */
export class Scene {
  readonly name = randomName('ts');
  readonly queue = this.name;
  readonly pool = new pg.Pool({ connectionString: DATABASE_URL, max: 4 });
  readonly inboxes: { inbox: Inbox; running: Promise<void> }[] = [];
  readonly logs: string[] = [];
  readonly effects = `effect_${this.name.replace('-', '_')}`;
  private constructor(readonly model: ChannelModel, readonly channel: ConfirmChannel) {}

  static async open(queue: Options.AssertQueue = {}): Promise<Scene> {
    const model = await amqp.connect(AMQP_URL);
    const scene = new Scene(model, await model.createConfirmChannel());
    await scene.channel.assertQueue(scene.queue, queue);
    await scene.pool.query(`CREATE TABLE ${scene.effects} (seq bigserial, message_id text, `
      + 'key text, number int)');
    return scene;
  }

  async close(): Promise<void> {
    await Promise.all(this.inboxes.map(({ inbox }) => inbox.stop()));
    await this.channel.deleteQueue(this.queue);
    await this.model.close();
    await this.pool.query(`DROP TABLE ${this.effects}`);
    await this.pool.end();
  }

  start(handler: Handler = this.insert, options: Partial<InboxOptions> = {}): Inbox {
    const inbox = new Inbox(this.name, { amqp: AMQP_URL, database: DATABASE_URL, queue: this.queue,
      backoff: 5, log: (level, text, fields) => {
        this.logs.push(`${level} ${text} ${JSON.stringify(fields)}`);
        if (process.env['TRACE']) console.error(this.logs.at(-1));
      }, ...options });
    this.inboxes.push({ inbox, running: inbox.run(handler) });
    return inbox;
  }

  readonly insert: Handler = async (message, tx) => {
    const number = message.body.length ? message.json<{ number?: number }>().number : null;
    await tx.query(`INSERT INTO ${this.effects} (message_id, key, number) VALUES ($1, $2, $3)`,
      [message.id, message.key, number ?? null]);
  };

  async send(...messages: Sent[]): Promise<void> {
    for (const { id = randomName('m'), key, body = {}, seconds, options = {} } of messages) {
      this.channel.sendToQueue(this.queue, Buffer.from(JSON.stringify(body)), {
        persistent: true, messageId: id, headers: key === undefined ? {} : { 'ws-key': key },
        ...seconds === null ? {} : { timestamp: seconds ?? Math.floor(Date.now() / 1000) },
        ...options });
    }
    await this.channel.waitForConfirms();
  }

  async rows<T extends pg.QueryResultRow>(sql: string, values: unknown[] = []): Promise<T[]> {
    return (await this.pool.query<T>(sql, values)).rows;
  }

  async handled(): Promise<string[]> {
    const rows = await this.rows<{ id: string }>(
      `SELECT message_id AS id FROM ${this.effects} ORDER BY seq`);
    return rows.map(({ id }) => id);
  }

  async parked(): Promise<{ message_id: string; reason: string; key: string; error: string }[]> {
    return this.rows('SELECT message_id, reason, key, error FROM watership_inbox.parked_messages '
      + 'WHERE consumer = $1 ORDER BY id', [this.name]);
  }

  /** Waits until as many effects are there, and nothing is left in the queue or unacknowledged. */
  async settled(effects: number, inbox: Inbox): Promise<string[]> {
    await until(`${effects} effects`, async () => (await this.handled()).length >= effects);
    await inbox.stop();
    const { messageCount } = await this.channel.checkQueue(this.queue);
    if (messageCount > 0) throw new Error(`${messageCount} messages were not acknowledged`);
    return this.handled();
  }
}

export function count(inbox: Inbox, name: string, label = ''): number {
  const series = Object.entries(inbox.counters)
    .filter(([key]) => key.startsWith(`watership_inbox_${name}_total{`) && key.includes(label));
  return series.reduce((sum, [, value]) => sum + value, 0);
}

/** Passes frames between a client and the broker, until it is told otherwise. */
export class Proxy {
  readonly #server = net.createServer((client) => this.#accept(client));
  readonly #pairs = new Set<{ client: net.Socket; broker: net.Socket; frozen: boolean }>();
  /** Frames of the broker that are not passed on. */
  drops: (frame: Buffer) => boolean = () => false;

  async listen(): Promise<string> {
    await new Promise<void>((resolve) => this.#server.listen(0, '127.0.0.1', resolve));
    const url = new URL(AMQP_URL);
    url.host = `127.0.0.1:${(this.#server.address() as net.AddressInfo).port}`;
    return url.href;
  }

  #accept(client: net.Socket): void {
    const { hostname, port } = new URL(AMQP_URL);
    const broker = net.connect(Number(port) || 5672, hostname);
    const pair = { client, broker, frozen: false };
    this.#pairs.add(pair);
    client.on('data', (data) => { if (!pair.frozen) broker.write(data); });
    let rest = Buffer.alloc(0);
    broker.on('data', (data) => {
      rest = Buffer.concat([rest, data]);
      for (;;) {
        const end = rest.length < 7 ? Infinity : rest.readUInt32BE(3) + 8;
        if (rest.length < end) break;
        const frame = rest.subarray(0, end);
        rest = rest.subarray(end);
        if (!pair.frozen && !this.drops(frame)) client.write(frame);
      }
    });
    for (const [one, other] of [[client, broker], [broker, client]] as const) {
      one.on('error', () => {});
      one.on('close', () => { if (!pair.frozen) other.destroy(); });
    }
  }

  /** What is connected now stays open and silent; what connects later is not touched. */
  freeze(): void { for (const pair of this.#pairs) pair.frozen = true; }

  cut(): void {
    for (const { client, broker } of this.#pairs) {
      client.destroy();
      broker.destroy();
    }
  }

  /** To the broker, as if the clients had sent it: they are silent now, so it is between frames. */
  inject(frame: Buffer): void { for (const { broker } of this.#pairs) broker.write(frame); }

  async close(): Promise<void> {
    this.cut();
    await new Promise((resolve) => this.#server.close(resolve));
  }
}
