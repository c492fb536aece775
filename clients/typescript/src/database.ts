// The database's side: a pool that is made again when it is lost, and transactions.
import pg from 'pg';
import { ignore, pause, within } from './broker.js';
import { clean } from './message.js';
import { call, value } from './sql.js';

/** The last of these serialization failures is a failure like any other. */
const SERIALIZATION_TRIES = 10;

export const codeOf = (error: unknown): string =>
  String((error as { code?: unknown } | null | undefined)?.code ?? '');
export const isSerialization = (error: unknown): boolean => /^(40001|40P01)$/.test(codeOf(error));
export const describe = (error: unknown): string =>
  clean(`${error instanceof Error ? error.message : String(error)} ${codeOf(error)}`.trim());

/** Whether the transaction was committed is not known. */
export class ConnectionLost extends Error {}

/** Does the work in a transaction, which is rolled back if this rejects: but see ConnectionLost. */
export async function transaction<T>(
  client: pg.PoolClient, work: () => Promise<T>, onRetry = ignore): Promise<T> {
  for (let tries = 1; ; tries += 1) {
    try {
      await client.query('BEGIN');
      const result = await work();
      // The COMMIT of an aborted transaction is not an error to Postgres.
      if ((await client.query('COMMIT')).command === 'COMMIT') return result;
      throw new Error('the handler ignored the error of a statement');
    } catch (error) {
      await client.query('ROLLBACK').catch(() => { throw new ConnectionLost(describe(error)); });
      if (!isSerialization(error) || tries >= SERIALIZATION_TRIES) throw error;
    }
    onRetry();
    await pause(Math.random() * 10 * tries);
  }
}

export async function maintain(client: pg.PoolClient): Promise<void> {
  while (await transaction(client, () => value(client, '(watership_inbox.maintain()).more')));
}

export class Database {
  readonly #busy = new Set<pg.PoolClient>();
  #pool: pg.Pool | undefined;

  constructor(readonly config: pg.PoolConfig, readonly onLost: (error: unknown) => void) {}

  get isOpen(): boolean { return this.#pool !== undefined; }

  async open(consumer: string): Promise<void> {
    if (this.#pool) return;
    this.#pool = new pg.Pool(this.config).on('error', ignore)
      .on('connect', (client) => client.on('error', ignore))
      .on('acquire', (client) => this.#busy.add(client))
      .on('release', (_, client) => this.#busy.delete(client));
    await this.run((client) => transaction(client, () => call(client, 'register', consumer)));
    await this.run(maintain);
  }

  /** Gives the work a connection of its own. If it rejects, the database counts as lost. */
  async run<T>(work: (client: pg.PoolClient) => Promise<T>): Promise<T> {
    const pool = this.#pool;
    if (!pool) throw new Error('the database is away');
    let client: pg.PoolClient | undefined;
    try {
      client = await pool.connect();
      const result = await work(client);
      client.release();
      return result;
    } catch (error) {
      client?.release(true);
      if (this.#pool === pool) {
        this.#pool = undefined;
        pool.end().catch(ignore);
        this.onLost(error);
      }
      throw error;
    }
  }

  /** Rolls back what is still running. */
  async close(): Promise<void> {
    await Promise.allSettled([...this.#busy].map((client) => client.end()));
    await within(1_000, 'closing', Promise.resolve(this.#pool?.end())).catch(ignore);
    this.#pool = undefined;
  }
}
