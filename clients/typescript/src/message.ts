// A message as handlers see it: from a delivery, or parked and retried.
import { createHash } from 'node:crypto';
import type { ConsumeMessage } from 'amqplib';

export type Json = null | boolean | number | string | Json[] | JsonObject;
export type JsonObject = { [name: string]: Json };

/** In seconds, the end of the year 9999. What is later is wrong, and so is this. */
const LAST_TIMESTAMP = 253402300799;

export class Message {
  constructor(
    /** AMQP's `message_id`; without one, `sha256-` and the hash of the body. */
    readonly id: string,
    /** AMQP's `timestamp`, in whole seconds. */
    readonly time: Date | null,
    /** The header `ws-key`; messages of one key are handled in order. */
    readonly key: string | null,
    readonly body: Buffer,
    /** AMQP's properties, exchange and routing key, under AMQP's names. Bytes are in base64. */
    readonly properties: JsonObject,
    readonly redelivered = false,
    readonly hasId = true,
  ) {}

  get headers(): JsonObject { return (this.properties['headers'] ?? {}) as JsonObject; }
  /** The event type, or `schema.table.op` of a captured change. */
  get type(): string | null { return text(this.properties['type']); }
  get contentType(): string | null { return text(this.properties['content_type']); }
  /** Positions of one relay compare as text, in the order of commits. */
  get position(): string | null { return text(this.headers['ws-position']); }
  /** W3C trace context, to continue the producer's trace. */
  get traceparent(): string | null { return text(this.headers['traceparent']); }
  /** How often a quorum queue has delivered it before. */
  get deliveryCount(): number { return Number(this.headers['x-delivery-count']) || 0; }
  /** It was delivered before, to whomever. */
  get again(): boolean { return this.redelivered || this.deliveryCount > 0; }
  json<T = unknown>(): T { return JSON.parse(this.body.toString()) as T; }
}

const text = (value: Json | undefined): string | null => typeof value === 'string' ? value : null;

export function parseMessage({ content, fields, properties }: ConsumeMessage): Message {
  const kept = toJson({ exchange: fields.exchange, routing_key: fields.routingKey,
    ...Object.fromEntries(Object.entries(properties).filter(([, value]) => value !== undefined)
      .map(([name, value]) => [name.replace(/[A-Z]/g, (c) => `_${c.toLowerCase()}`), value])) });
  const { messageId: id, timestamp }: { messageId: unknown; timestamp: unknown } = properties;
  // Postgres does not store NUL; and ids that are not UTF-8 are read as one and the same.
  const hasId = typeof id === 'string' && id !== '' && !/[\0\uFFFD]/.test(id);
  const time = typeof timestamp !== 'number' ? null
    : new Date(Math.min(timestamp, LAST_TIMESTAMP) * 1000);
  const key = (kept['headers'] as JsonObject | undefined)?.['ws-key'] ?? null;
  const keyText = key === null ? null : text(key) ?? JSON.stringify(key);
  const hash = createHash('sha256').update(content).digest('hex');
  return new Message(hasId ? id : `sha256-${hash}`, time, keyText, content, kept,
    fields.redelivered, hasId);
}

/** Postgres does not store NUL. */
export const clean = (value: string): string => value.replaceAll('\0', '\uFFFD');

/** A value of amqplib's, which has `{ '!': type, value }` for what JavaScript lacks. */
function toJson(value: object): JsonObject;
function toJson(value: unknown): Json;
function toJson(value: unknown): Json {
  if (typeof value === 'string') return clean(value);
  if (typeof value === 'number') return Number.isFinite(value) ? value : String(value);
  if (Buffer.isBuffer(value)) return value.toString('base64');
  if (Array.isArray(value)) return value.map((item: unknown) => toJson(item));
  if (typeof value !== 'object' || value === null) return value as Json;
  if ('!' in value && 'value' in value) return toJson(value.value);
  return Object.fromEntries(Object.entries(value).map(([name, v]) => [clean(name), toJson(v)]));
}
