// The database's side: a pool that is made again when it is lost, and transactions.
import pg from 'pg';
import { ignore, within } from './broker.js';
import { clean } from './message.js';
import { call, value } from './sql.js';

/** The code of the innermost cause that has one: layers above the driver wrap its errors. */
export function codeOf(error: unknown): string {
  let code = '';
  for (let depth = 0; typeof error === 'object' && error && depth < 20; depth += 1) {
    const { code: own, cause } = error as { code?: unknown; cause?: unknown };
    [code, error] = [String(own ?? code), cause];
  }
  return code;
}
/** Of two transactions: nobody's fault. */
export const isConflict = (error: unknown): boolean => /^(40001|40P01)$/.test(codeOf(error));
const ENDED = 'the handler ended the transaction (COMMIT or ROLLBACK): leave that to the inbox: ';
/** What a handler has done before a statement fails so. */
const SPOILT: { [code: string]: string } = { '25P01': ENDED, '3B001': ENDED,
  '25P02': 'the handler hid an error of the database: ' };
export const describe = (error: unknown): string => clean(`${SPOILT[codeOf(error)] ?? ''}${
  error instanceof Error ? error.message : String(error)} ${codeOf(error)}`.trim());

/** Lets the window move on; to a message that it could not take, if given. */
export async function maintain(client: pg.PoolClient, seen: Date | null = null): Promise<void> {
  while (await value(client, '(watership_inbox.maintain($1)).more', seen?.toISOString()));
}

const OLD_SCHEMA = 'the inbox schema is older than this client: run watership inbox install';

export class Database {
  readonly #busy = new Set<pg.PoolClient>();
  #pool: pg.Pool | undefined;
  #isOpen = false;

  constructor(readonly config: pg.PoolConfig, readonly onLost: (error: unknown) => void) {}

  get isOpen(): boolean { return this.#isOpen; }

  async open(consumer: string): Promise<void> {
    if (this.#isOpen) return;
    this.#pool = new pg.Pool(this.config).on('error', ignore)
      .on('connect', (client) => client.on('error', ignore))
      .on('acquire', (client) => this.#busy.add(client))
      .on('release', (_, client) => this.#busy.delete(client));
    await this.run(async (client) => {
      await call(client, 'register', consumer);
      // Of the newest file in sql/inbox whose functions are called here.
      if (await value(client, "to_regproc('watership_inbox.suspect') IS NULL")) {
        throw new Error(OLD_SCHEMA);
      }
      await maintain(client);
    });
    this.#isOpen = true;
  }

  /** Connections that nobody is to get again: their transaction may be open. */
  readonly broken = new WeakSet<pg.PoolClient>();

  /** Gives the work a connection of its own. If it rejects, the database counts as lost. */
  async run<T>(work: (client: pg.PoolClient) => Promise<T>): Promise<T> {
    const pool = this.#pool;
    if (!pool) throw new Error('the database is unreachable');
    let client: pg.PoolClient | undefined;
    try {
      client = await pool.connect();
      const result = await work(client);
      client.release(this.broken.has(client));
      return result;
    } catch (error) {
      client?.release(true);
      if (this.#pool === pool) {
        this.#pool = undefined;
        pool.end().catch(ignore);
        if (this.#isOpen) this.onLost(error);
        this.#isOpen = false;
      }
      throw error;
    }
  }

  /** Rolls back what is still running. */
  async close(): Promise<void> {
    await Promise.allSettled([...this.#busy].map((client) => client.end()));
    await within(1_000, 'closing', Promise.resolve(this.#pool?.end())).catch(ignore);
    this.#pool = undefined;
    this.#isOpen = false;
  }
}
