import type { SocketOptions } from 'amqplib';
import type { PoolClient, PoolConfig } from 'pg';
import { ignore } from './broker.js';
import type { JsonObject, Message } from './message.js';

/** Does its work through `tx` alone; COMMIT and ROLLBACK are not its business. */
export type Handler = (message: Message, tx: PoolClient) => Promise<void> | void;
/** Thrown by a handler that would fail at every other attempt as well. */
export class Permanent extends Error {}
export type Level = 'debug' | 'info' | 'warn' | 'error';
export type Labels = { [label: string]: string };

/** What may be left out; the README explains it. Times are in milliseconds. */
export const DEFAULTS = {
  ordered: false, prefetch: 50, concurrency: 8,
  onFailure: 'park' as 'park' | { exchange: string; routingKey: string },
  maxFailures: 5, maxKills: 10, backoff: 100, maxBackoff: 10_000,
  stopTimeout: 30_000, watchdog: 15_000, watchdogIdle: 30_000,
  socket: {} as SocketOptions,
  onCount: ignore as (name: string, labels: Labels) => void,
  log: (level: Level, text: string, fields: JsonObject): void => {
    if (level !== 'debug') console.error(`watership ${level}: ${text} ${JSON.stringify(fields)}`);
  },
};
export type InboxOptions =
  Partial<typeof DEFAULTS> & { amqp: string; database: string | PoolConfig; queue: string };
