// The SQL functions of inbox and outbox, in the caller's transaction.
import type { Json, Message } from './message.js';

/** A client of `pg`, or anything else that runs a statement with parameters. */
export interface Queryable {
  query(text: string, values?: unknown[]): Promise<{ rows: unknown[] }>;
}

/** The value of an expression with the parameters `$1`, `$2`, … */
export async function value<T>(db: Queryable, sql: string, ...values: unknown[]): Promise<T> {
  return ((await db.query(`SELECT ${sql} AS value`, values)).rows[0] as { value: T }).value;
}

/** Calls a function of the inbox. */
export function call<T>(db: Queryable, name: string, ...values: unknown[]): Promise<T> {
  const parameters = values.map((_, i) => `$${i + 1}`).join();
  return value(db, `watership_inbox.${name}(${parameters})`, ...values);
}

/** In UTC, whatever the time zones of process and session. */
const utc = (time: Date | null): string | null => time && time.toISOString();

/**
 * True the first time, false for a duplicate; waits for another transaction with the same claim.
 * `time` is AMQP's timestamp, or null. Errors: SQLSTATE WI001 older than the window, WI002 from the
 * future, WI003 not maintained, WI004 another body; 40001, 40P01: run the transaction again.
 */
export function claim(db: Queryable, consumer: string, id: string, time: Date | null,
  { bodyHash = null, strict = false }: { bodyHash?: Buffer | null; strict?: boolean } = {},
): Promise<boolean> {
  return time ? call(db, 'claim', consumer, id, utc(time), bodyHash, strict)
    : call(db, 'claim', consumer, id);
}

/** The ids of the new ones. With an error, as of `claim`, none of them is claimed. */
export function claimMany(db: Queryable, consumer: string,
  messages: readonly { id: string; time: Date }[]): Promise<string[]> {
  return value(db, 'ARRAY(SELECT watership_inbox.claim_many($1, $2, $3))',
    consumer, messages.map((m) => m.id), messages.map((m) => utc(m.time)));
}

export type Outcome = 'handle' | 'duplicate' | 'parked';

/** A function of the inbox that gets a whole message, and returns one row. */
export async function about<T>(db: Queryable, name: string, consumer: string, m: Message,
  ...more: unknown[]): Promise<T> {
  const values =
    [consumer, m.id, utc(m.time), m.key, m.body, JSON.stringify(m.properties), ...more];
  const parameters = values.map((_, i) => `$${i + 1}`).join();
  return (await db.query(`SELECT * FROM watership_inbox.${name}(${parameters})`, values))
    .rows[0] as T;
}

/** What is to be done about a message. */
export interface Next { next: string; reason: string }

/** Only what is to `handle` is handled; all are committed, and acknowledged then. */
export async function receive(db: Queryable, consumer: string, m: Message): Promise<Outcome> {
  return (await about<{ receive: Outcome }>(db, 'receive', consumer, m)).receive;
}

/** Stores what cannot be handled, with its key; false if it was handled or parked meanwhile. */
export function park(db: Queryable, consumer: string, m: Message, reason: string,
  error: string | null): Promise<boolean> {
  const properties = JSON.stringify(m.properties);
  return call(db, 'park', consumer, m.id, utc(m.time), m.key, reason, error, m.body, properties);
}

/** Lets a message have its effect once more, at its next delivery; false if it was not known. */
export function forget(db: Queryable, consumer: string, id: string): Promise<boolean> {
  return call(db, 'forget', consumer, id);
}

/** Headers: integers beyond 2^53 as bigint. The id is a UUID, never used again; default: random. */
export type Event = {
  aggregateType: string; aggregateId: string | number | bigint; eventType: string;
  headers?: { readonly [name: string]: Json | bigint }; id?: string;
} & (
  | { /** What JSON.stringify takes. */ payload: unknown }
  | { /** Sent byte for byte. */ json: string }
  | { data: Uint8Array; contentType: string }
);

/** Writes the event into the outbox, and returns its id. */
export async function emit(db: Queryable, event: Event): Promise<string> {
  const { aggregateType, aggregateId, eventType, headers = {}, id = null } = event;
  if (typeof aggregateId === 'number' && !Number.isSafeInteger(aggregateId)) {
    throw new TypeError(`aggregateId is ${aggregateId}; allowed are text, bigint and integers `
      + 'below 2^53');
  }
  const fields = Object.entries(headers).map(([name, v]) =>
    `${JSON.stringify(name)}:${typeof v === 'bigint' ? v : JSON.stringify(v)}`);
  const values = [aggregateType, String(aggregateId), eventType, `{${fields.join()}}`, id];
  if ('data' in event) {
    return value(db, 'watership.emit_bytes($1, $2::text, $3, $6, $7, $4, $5)::text', ...values,
      Buffer.from(event.data), event.contentType);
  }
  const json = 'json' in event ? event.json : JSON.stringify(event.payload);
  return value(db, 'watership.emit($1, $2::text, $3, $6::text, $4, $5)::text', ...values, json);
}
