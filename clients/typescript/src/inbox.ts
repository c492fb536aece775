// A consumer: each message has its effect once, and in the order of its key, whatever crashes.
import { once } from 'node:events';
import type { ConsumeMessage } from 'amqplib';
import type { PoolClient } from 'pg';
import { Connection, ignore, pause, Subscription, within } from './broker.js';
import { codeOf, ConnectionLost, Database, describe, isSerialization, maintain, transaction }
  from './database.js';
import { Message, parseMessage, type JsonObject } from './message.js';
import { DEFAULTS, Permanent, type Handler, type InboxOptions, type Labels,
  type Level } from './options.js';
import { call, park, receive, value, type Outcome } from './sql.js';

/** How long to wait before connecting again, in ms: doubled each time. */
const RECONNECT = { first: 100, most: 5_000 };
/** The leader of a quorum queue may take its time to accept a consumer, in ms. */
const SUBSCRIBE_LIMIT = 20_000;

/** `again`: it was delivered before, perhaps to a process that died of it; `isSuspect`: an attempt
 *  at it began and did not end; `recorded`: it has a row in watership_inbox.attempt. */
interface Job {
  readonly delivery: ConsumeMessage; readonly message: Message; readonly subscription: Subscription;
  readonly again: boolean; isSuspect?: boolean; recorded: boolean; failed: number; killed: number;
}

interface Failure { reason: 'failed' | 'killed'; error: string; isFinal: boolean }

class Killed extends Error {
  constructor(times: number) { super(`the process died ${times} times while it handled this`); }
}

/** Runs so much work at the same time; the rest waits in line. */
function slots(free: number): <T>(work: () => Promise<T>) => Promise<T> {
  const waiting: (() => void)[] = [];
  return async (work) => {
    if (free > 0) free -= 1;
    else await new Promise<void>((resolve) => waiting.push(resolve));
    return work().finally(() => (waiting.shift() ?? (() => { free += 1; }))());
  };
}

export class Inbox {
  /** By series, as Prometheus has them: `watership_inbox_handled_total{consumer="billing"}`. */
  readonly counters: { [series: string]: number } = {};
  readonly #options;
  readonly #inSlot;
  readonly #alone = slots(1);
  /** The end of what is to be done for each key. */
  readonly #lanes = new Map<string, Promise<void>>();
  readonly #stop = new AbortController();
  readonly #database: Database;
  readonly #connection: Connection;
  /** Apart, because a broker short of memory does not read from connections that publish. */
  readonly #publisher: Connection;
  #subscription: Subscription | undefined;
  #handler: Handler = ignore;
  #running: Promise<void> | undefined;

  constructor(readonly consumer: string, options: InboxOptions) {
    const given = Object.fromEntries(Object.entries(options).filter(([, v]) => v !== undefined));
    const { amqp, database, concurrency, socket } = this.#options =
      { ...DEFAULTS, ...given as unknown as InboxOptions };
    const name = `watership inbox ${consumer}`;
    this.#inSlot = slots(concurrency);
    this.#connection = new Connection(amqp, name, socket);
    this.#publisher = new Connection(amqp, `${name}, dead letters`, socket);
    // One connection for each slot, two for a retry, one for maintenance.
    this.#database = new Database({ fallback_application_name: name, connectionTimeoutMillis: 5_000,
      ...typeof database === 'string' ? { connectionString: database } : database,
      max: concurrency + 3 }, (error) => {
      this.#log('error', 'the database is away', { error: describe(error) });
      this.#subscription?.lose('database');
    });
  }

  /** Consumes until `stop`. Whatever it loses meanwhile, it connects to again. */
  run(handler: Handler): Promise<void> {
    this.#handler = async (message, tx) => {
      await handler(message, tx);
      if (tx.getTransactionStatus() !== 'I') return;
      throw new Error('the handler ended its transaction: leave COMMIT and ROLLBACK to the inbox');
    };
    return this.#running ??= this.#run();
  }

  /** Begins no more messages, lets the handlers end, closes everything; then `run` returns. */
  async stop(): Promise<void> {
    this.#stop.abort();
    this.#subscription?.windDown();
    await this.#running;
  }

  async #run(): Promise<void> {
    const background =
      [this.#every(1_000, (c) => this.#retry(c)), this.#every(3_600_000, maintain)];
    for (let delay = RECONNECT.first; !this.#stop.signal.aborted;) {
      const begin = performance.now();
      try {
        await this.#database.open(this.consumer);
        await this.#consume();
      } catch (error) {
        this.#log('warn', 'cannot consume yet', { error: describe(error) });
        // Also the end of a consumer that would be accepted later.
        await this.#connection.close();
      }
      if (performance.now() - begin > RECONNECT.most) delay = RECONNECT.first;
      await pause(delay, this.#stop.signal);
      delay = Math.min(2 * delay, RECONNECT.most);
    }
    const handlers = Promise.allSettled([...this.#lanes.values(), ...background]);
    await within(this.#options.stopTimeout, 'the handlers', handlers).catch((error: unknown) =>
      this.#log('error', 'what is unfinished is rolled back', { error: describe(error) }));
    this.#subscription?.lose('stopped');
    await Promise.all([this.#subscription?.close(), this.#database.close()]);
    await Promise.all([this.#connection.close(), this.#publisher.close()]);
  }

  /** Until the subscription is lost, and its channel closed; at a stop it returns at once. */
  async #consume(): Promise<void> {
    const { queue, watchdog, watchdogIdle } = this.#options;
    const opening = Subscription.open(this.#connection, queue,
      (version) => this.#prefetch(version), (delivery, from) => this.#deliver(delivery, from));
    const subscription = this.#subscription = await within(SUBSCRIBE_LIMIT, 'subscribing', opening);
    this.#log('info', 'subscribed', { queue });
    if (!this.#database.isOpen) subscription.lose('database');
    if (this.#stop.signal.aborted) subscription.windDown();
    void subscription.watch(watchdog, watchdogIdle);
    if (!subscription.over.aborted) await once(subscription.over, 'abort');
    if (!subscription.cause) return;
    this.#tell('warn', 'resubscribed', undefined, null, { cause: subscription.cause });
    await subscription.close();
  }

  #prefetch(version: string): number {
    const [major = 0, minor = 0] = version.split('.').map(Number);
    const keepsOrder = major > 4 || (major === 4 && minor >= 3);
    if (!this.#options.ordered || keepsOrder) return this.#options.prefetch;
    this.#log('info', 'prefetch is 1: redelivery may change the order', { broker: version });
    return 1;
  }

  #deliver(delivery: ConsumeMessage, subscription: Subscription): void {
    const message = parseMessage(delivery);
    const again = message.redelivered || message.deliveryCount > 0;
    if (again) this.#tell('debug', 'redelivered', message);
    const job = { delivery, message, subscription, again, recorded: false, failed: 0, killed: 0 };
    const lane = message.key === null ? `m${message.id}` : `k${message.key}`;
    // Lanes outlive subscriptions: what comes again waits for what is still being handled.
    const done = (this.#lanes.get(lane) ?? Promise.resolve())
      .then(() => this.#work(job)).catch(ignore).finally(() => {
        subscription.inHand -= 1;
        if (this.#lanes.get(lane) === done) this.#lanes.delete(lane);
      });
    this.#lanes.set(lane, done);
  }

  /** From the first attempt to the acknowledgement. Rejects if the message is to come again. */
  async #work(job: Job): Promise<void> {
    const { message, subscription } = job;
    let isDone = !message.hasId;
    if (isDone) await this.#park(job, 'no_message_id', null);
    const attempt = (): Promise<Failure | null> => this.#begin(job, (c) => this.#attempt(c, job));
    while (!isDone) {
      // A process that dies takes all its attempts with it. What was being handled when one died
      // is handled one at a time, so that only the message to blame collects more kills.
      job.isSuspect ??= job.again && await this.#begin(job, (client) => value(client,
        'EXISTS (SELECT FROM watership_inbox.unfinished_attempts WHERE consumer = $1 '
        + 'AND message_id = $2 AND killed > 0)', this.consumer, message.id));
      const failure = await (job.isSuspect ? this.#alone(attempt) : attempt());
      isDone = !failure || failure.isFinal;
      if (failure?.isFinal) await this.#giveUp(job, failure);
      else if (failure) await this.#backOff(job.failed, subscription);
    }
    subscription.ack(job.delivery);
  }

  async #attempt(client: PoolClient, job: Job): Promise<Failure | null> {
    const { message } = job;
    const { maxFailures, maxKills, onFailure } = this.#options;
    if (job.again && !job.recorded) {
      Object.assign(job, await this.#attemptStarted(client, message), { recorded: true });
    }
    const isLast = job.failed + 1 >= maxFailures && onFailure === 'park';
    let isHandling = false;
    let error: string | null = null;
    const work = async (): Promise<Outcome> => {
      isHandling = false;
      const outcome = await receive(client, this.consumer, message);
      if (outcome === 'handle') {
        if (job.killed >= maxKills) throw new Killed(job.killed);
        if (isLast) await client.query('SAVEPOINT watership_last');
        isHandling = true;
        try {
          await this.#handler(message, client);
        } catch (thrown) {
          const status = client.getTransactionStatus();
          if (!isLast || status === 'I' || isSerialization(thrown)) throw thrown;
          error = describe(thrown);
          // In the same transaction, so that nothing of its key passes in between.
          await client.query('ROLLBACK TO SAVEPOINT watership_last');
          await park(client, this.consumer, message, 'failed', error);
          return 'parked';
        }
      }
      if (job.recorded) await call(client, 'attempt_ended', this.consumer, message.id);
      return outcome;
    };
    try {
      const onRetry = (): void => this.#tell('debug', 'retries', message);
      const outcome = await transaction(client, work, onRetry);
      if (error !== null) this.#tell('warn', 'failures', message, error);
      if (outcome === 'handle') this.#tell('debug', 'handled', message);
      if (outcome === 'duplicate') this.#tell('debug', 'duplicates', message);
      if (outcome === 'parked') {
        const reason = error !== null ? 'failed' : await value<string>(client, 'coalesce((SELECT '
          + 'reason FROM watership_inbox.parked_messages WHERE consumer = $1 AND message_id = $2), '
          + "'behind')", this.consumer, message.id);
        this.#tell('error', 'parked', message, error, { reason });
      }
      return null;
    } catch (thrown) {
      if (thrown instanceof ConnectionLost) throw thrown;
      error = describe(thrown);
      if (thrown instanceof Killed) return { reason: 'killed', error, isFinal: true };
      if (codeOf(thrown) === 'WI003' && !isHandling) await maintain(client);
      // Data, constraints, limits: another message may pass. The rest is not a message's fault.
      else if (!isHandling && !/^(22|23|54|WI)/.test(codeOf(thrown))) throw thrown;
      job.failed = await transaction(client, () =>
        call(client, 'attempt_failed', this.consumer, message.id, error));
      job.recorded = true;
      this.#tell('warn', 'failures', message, error);
      const isFinal = thrown instanceof Permanent || job.failed >= maxFailures;
      return { reason: 'failed', error, isFinal };
    }
  }

  #attemptStarted(client: PoolClient, m: Message): Promise<{ failed: number; killed: number }> {
    return transaction(client, () => value(client,
      'to_jsonb(watership_inbox.attempt_started($1, $2))', this.consumer, m.id));
  }

  async #giveUp(job: Job, { reason, error }: Failure): Promise<void> {
    const { delivery, message, subscription } = job;
    const { onFailure } = this.#options;
    if (onFailure === 'park') return this.#park(job, reason, error);
    // A CC would send copies to where the message came from.
    const { CC: _, 'x-delivery-count': __, ...headers } = delivery.properties.headers ?? {};
    const dead = { ...headers, 'ws-dead-consumer': this.consumer, 'ws-dead-reason': reason,
      'ws-dead-error': Buffer.from(error).subarray(0, 1_000).toString().replace(/\uFFFD+$/, ''),
      'ws-dead-failures': job.failed };
    const { exchange, routingKey } = onFailure;
    const publish = (): Promise<boolean> =>
      this.#publisher.publish(exchange, routingKey, delivery, dead).then(() => true, (refused) => {
        this.#log('error', 'cannot dead-letter', { error: describe(refused) }, message);
        return false;
      });
    for (let tries = 1; !await publish(); tries += 1) {
      await this.#backOff(tries, subscription);
      if (subscription.over.aborted) throw new Error('left to its next delivery');
    }
    this.#tell('error', 'dead_lettered', message, error, { reason });
    // Moved back from there, it starts from the beginning.
    await this.#begin(job, (client) =>
      transaction(client, () => call(client, 'attempt_ended', this.consumer, message.id)));
  }

  async #park(job: Job, reason: string, error: string | null): Promise<void> {
    const isParked = await this.#begin(job, (client) =>
      transaction(client, () => park(client, this.consumer, job.message, reason, error)));
    if (isParked) this.#tell('error', 'parked', job.message, error, { reason });
    else this.#tell('debug', 'duplicates', job.message);
  }

  /** Handles the next parked message that an operator wants retried; false if there is none. */
  async #retry(client: PoolClient): Promise<boolean> {
    let begun: { id: string; message: Message; killed: number } | undefined;
    let isHandling = false;
    const work = async (): Promise<void> => {
      isHandling = false;
      const { rows: [row] } = await client.query('SELECT id::text, message_id, key, body, '
        + 'to_json(occurred_at)::text AS time, properties::text '
        + 'FROM watership_inbox.retry_next($1)', [this.consumer]);
      if (!row) return void (begun = undefined);
      const { id, message_id, time, key, body, properties } = row;
      const message = new Message(message_id, time && new Date(JSON.parse(time)), key, body,
        JSON.parse(properties));
      // Not once more for another try of the same attempt.
      const { killed } = begun && begun.id === id ? begun
        : await this.#database.run((c) => this.#attemptStarted(c, message));
      begun = { id, message, killed };
      isHandling = true;
      if (killed >= this.#options.maxKills) throw new Killed(killed);
      await this.#handler(message, client);
      await call(client, 'retry_done', id);
    };
    try {
      await transaction(client, work, () => this.#tell('debug', 'retries', begun?.message));
      if (begun) this.#tell('debug', 'handled', begun.message);
    } catch (thrown) {
      if (thrown instanceof ConnectionLost || !isHandling || !begun) throw thrown;
      const { id, message } = begun;
      const error = describe(thrown);
      await transaction(client, () => call(client, 'retry_failed', id, error));
      this.#tell('warn', 'failures', message, error);
    }
    return begun !== undefined && !this.#stop.signal.aborted;
  }

  /** Work for a message, unless it is to be left to its next delivery. */
  #begin<T>({ subscription }: Job, work: (client: PoolClient) => Promise<T>): Promise<T> {
    return this.#inSlot(async () => {
      if (subscription.over.aborted) throw new Error('left to its next delivery');
      return this.#database.run(work);
    });
  }

  #backOff(failures: number, { over }: Subscription): Promise<void> {
    const { backoff, maxBackoff } = this.#options;
    return pause(Math.random() * Math.min(maxBackoff, backoff * 2 ** (failures - 1)), over);
  }

  async #every(ms: number, work: (client: PoolClient) => Promise<boolean | void>): Promise<void> {
    while (!this.#stop.signal.aborted) {
      await pause(ms, this.#stop.signal);
      for (let more = true; more && this.#database.isOpen && !this.#stop.signal.aborted;) {
        more = await this.#database.run(work).catch(ignore) === true;
      }
    }
  }

  /** Counts what happened, and logs it. */
  #tell(level: Level, what: string, message?: Message, error: string | null = null,
    more: Labels = {}): void {
    const name = `watership_inbox_${what}_total`;
    const labels: Labels = { consumer: this.consumer, ...more };
    const pairs = Object.entries(labels).map(([label, text]) => `${label}=${JSON.stringify(text)}`);
    const series = `${name}{${pairs.join()}}`;
    this.counters[series] = (this.counters[series] ?? 0) + 1;
    this.#options.onCount(name, labels);
    this.#log(level, what, { ...more, ...error !== null && { error } }, message);
  }

  #log(level: Level, text: string, fields: JsonObject, message?: Message): void {
    const about = message && { message_id: message.id, key: message.key };
    this.#options.log(level, text, { consumer: this.consumer, ...about, ...fields });
  }
}
