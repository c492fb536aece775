// A consumer: each message has its effect once, and in the order of its key, whatever crashes.
import { once } from 'node:events';
import type { ConsumeMessage } from 'amqplib';
import type { PoolClient } from 'pg';
import { ignore, pause, publish, Subscription, within, type Broker } from './broker.js';
import { codeOf, Database, describe, isConflict, maintain } from './database.js';
import { Message, parseMessage, type JsonObject } from './message.js';
import { DEFAULTS, Permanent, type Handler, type InboxOptions, type Labels,
  type Level } from './options.js';
import { about, call, type Next } from './sql.js';

/** How long to wait before connecting again, in ms: doubled each time. */
const RECONNECT = { first: 100, most: 5_000 };
/** One more of them in a row is a failure like any other. */
const MOST_CONFLICTS = 9;

/** A message, and what is known of its attempts; `retried` numbers one that was parked, another has
 *  a delivery; `failure` ended the last attempt, and is not noted yet. */
interface Job {
  readonly message: Message; readonly delivery?: ConsumeMessage; readonly retried: string | null;
  begun?: boolean; stage?: '' | 'handler' | 'commit'; failure?: { thrown: unknown }; reason?: string;
  error?: string | null; conflicts: number; failed: number;
}

/** What is to be done about a message, and for how long to wait before, at most. */
interface Todo { next: string; wait: number }

const LEFT = new Error('left to its next delivery');

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
  readonly #broker: Broker;
  #subscription: Subscription | undefined;
  #handler: Handler = ignore;
  #running: Promise<void> | undefined;

  constructor(readonly consumer: string, options: InboxOptions) {
    const given = Object.fromEntries(Object.entries(options).filter(([, v]) => v !== undefined));
    const { amqp, database, concurrency, socket } = this.#options =
      { ...DEFAULTS, ...given as unknown as InboxOptions };
    const name = `watership inbox ${consumer}`;
    this.#inSlot = slots(concurrency);
    this.#broker = { url: amqp, name, socket };
    // A host that vanished must not be waited for indefinitely.
    this.#database = new Database({ fallback_application_name: name, connectionTimeoutMillis: 5_000,
      keepAlive: true, keepAliveInitialDelayMillis: 10_000,
      ...typeof database === 'string' ? { connectionString: database } : database,
      max: concurrency }, (error) => {
      this.#log('error', 'the database is unreachable', { error: describe(error) });
      this.#subscription?.lose('database');
    });
  }

  /** Consumes until `stop`. Whatever it loses meanwhile, it connects to again. */
  run(handler: Handler): Promise<void> {
    this.#handler = handler;
    return this.#running ??= this.#run();
  }

  /** Begins no more messages, lets the handlers end, closes everything; then `run` returns. */
  async stop(): Promise<void> {
    this.#stop.abort();
    this.#subscription?.windDown();
    await this.#running;
  }

  async #run(): Promise<void> {
    const upkeep = this.#upkeep();
    for (let delay = RECONNECT.first; !this.#stop.signal.aborted;) {
      const begin = performance.now();
      try {
        await this.#database.open(this.consumer);
        await this.#consume();
      } catch (error) {
        this.#log('warn', 'cannot consume yet', { error: describe(error) });
      }
      if (performance.now() - begin > RECONNECT.most) delay = RECONNECT.first;
      await pause(delay, this.#stop.signal);
      delay = Math.min(2 * delay, RECONNECT.most);
    }
    const handlers = Promise.allSettled([...this.#lanes.values(), upkeep]);
    await within(this.#options.stopTimeout, 'the handlers', handlers).catch((error: unknown) =>
      this.#log('error', 'what is unfinished is rolled back', { error: describe(error) }));
    this.#subscription?.lose('stopped');
    await Promise.all([this.#subscription?.close(), this.#database.close()]);
  }

  /** Until the subscription is lost, and its channel closed; at a stop it returns at once. */
  async #consume(): Promise<void> {
    const { queue, watchdog, watchdogIdle } = this.#options;
    const subscription = this.#subscription = await Subscription.open(this.#broker, queue,
      (version) => this.#prefetch(version), (delivery, from) => this.#deliver(delivery, from));
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
    if (message.again) this.#tell('debug', 'redelivered', message);
    const job = { message, delivery, retried: null, conflicts: 0, failed: 0 };
    const lane = message.key === null ? `m${message.id}` : `k${message.key}`;
    // Lanes outlive subscriptions: what comes again waits for what is still being handled.
    const done = (this.#lanes.get(lane) ?? Promise.resolve())
      .then(() => this.#work(job, subscription.over))
      .then(() => subscription.ack(delivery), ignore).finally(() => {
        subscription.inHand -= 1;
        if (this.#lanes.get(lane) === done) this.#lanes.delete(lane);
      });
    this.#lanes.set(lane, done);
  }

  /** One message to its end. Rejects if it is to come again. */
  async #work(job: Job, over: AbortSignal): Promise<void> {
    const { message } = job;
    // A process that dies takes all its attempts with it. What was being handled when one died is
    // handled one at a time, so that only the message to blame collects more kills.
    const isSuspect = message.again && await this.#begin(over, (client) =>
      call<boolean>(client, 'suspect', this.consumer, message.id));
    const attempt = (): Promise<Todo> => this.#begin(over, (c) => this.#attempt(c, job));
    let todo: Todo = { next: 'again', wait: 0 };
    while (todo.next === 'again' || todo.next === 'dead_letter') {
      if (todo.wait > 0) await pause(Math.random() * todo.wait, over);
      todo = await (todo.next === 'dead_letter' ? this.#deadLetter(job, over)
        : isSuspect ? this.#alone(attempt) : attempt());
    }
  }

  /** One transaction. */
  async #attempt(client: PoolClient, job: Job): Promise<Todo> {
    const { backoff, maxBackoff } = this.#options;
    const { message } = job;
    try {
      const next = await (job.failure ? this.#fail(client, job) : this.#receive(client, job));
      if (next === 'handle') this.#tell('debug', 'handled', message);
      if (next === 'duplicate') this.#tell('debug', 'duplicates', message);
      if (next === 'parked') {
        this.#tell('error', 'parked', message, job.error, { reason: job.reason ?? '' });
      }
      return { next, wait: Math.min(maxBackoff, backoff * 2 ** (job.failed - 1)) };
    } catch (error) {
      if (codeOf(error) === 'WI003' || isConflict(error) && job.conflicts < MOST_CONFLICTS) {
        await client.query('ROLLBACK');
        job.conflicts += 1;
        if (isConflict(error)) this.#tell('debug', 'retries', message);
        else await maintain(client, message.time);
        return { next: 'again', wait: isConflict(error) ? 10 * job.conflicts : maxBackoff };
      }
      // In the same transaction, so that nothing of its key passes before it is parked.
      const isOpen = await client.query('ROLLBACK TO SAVEPOINT watership_handler')
        .catch(() => client.query('ROLLBACK')).then(() => true, () => false);
      if (!isOpen) this.#database.broken.add(client);
      // Data, constraints, limits: another message may pass. The rest is not a message's fault.
      if (job.failure || !isOpen && job.stage !== 'handler'
        || !job.stage && !/^(22|23|54|WI)/.test(codeOf(error))) throw error;
      if (!isOpen && !job.conflicts) {
        // The connection was lost under the handler. Once that may be chance.
        job.conflicts = 1;
        this.#tell('warn', 'retries', message, describe(error));
        return { next: 'again', wait: backoff };
      }
      job.failure = { thrown: error };
      if (!isOpen) return { next: 'again', wait: 0 };
      job.conflicts = 0;
      return this.#attempt(client, job);
    }
  }

  async #receive(client: PoolClient, job: Job): Promise<string> {
    const { message, retried } = job;
    job.stage = '';
    if (!job.begun && (message.again || !message.hasId)) {
      const noted = await about<Job & Next>(client, 'begin_message', this.consumer, message,
        retried, message.hasId, this.#options.maxKills, this.#deadLetters);
      Object.assign(job, noted, { begun: true });
      if (noted.next !== 'handle') return noted.next;
    }
    await client.query('BEGIN');
    const { next, reason } = await about<Next>(
      client, 'receive_message', this.consumer, message, retried);
    job.reason = reason;
    if (next === 'handle') {
      await client.query('SAVEPOINT watership_handler');
      job.stage = 'handler';
      await this.#handler(message, client);
      // An error if the handler ended its transaction, or ignored the error of a statement.
      await client.query('RELEASE SAVEPOINT watership_handler');
      if (job.begun) await call(client, 'end_message', this.consumer, message.id, retried);
      job.stage = 'commit';
    }
    await client.query('COMMIT');
    return next;
  }

  async #fail(client: PoolClient, job: Job): Promise<string> {
    const { message, retried } = job;
    const thrown = job.failure?.thrown;
    job.error = describe(thrown);
    const noted = await about<Job & Next>(client, 'fail_message', this.consumer, message, retried,
      job.error, thrown instanceof Permanent, this.#options.maxFailures, this.#deadLetters);
    await client.query('COMMIT');
    delete job.failure;
    Object.assign(job, noted, { begun: true });
    this.#tell('warn', 'failures', message, job.error);
    return noted.next;
  }

  get #deadLetters(): boolean { return this.#options.onFailure !== 'park'; }

  /** As an attempt. */
  async #deadLetter(job: Job, over: AbortSignal): Promise<Todo> {
    const { delivery, message, error = null, reason = '', failed } = job;
    const { backoff, maxBackoff, onFailure } = this.#options;
    if (over.aborted || !delivery || onFailure === 'park') throw LEFT;
    // A CC would send copies to where the message came from.
    const { CC: _, 'x-delivery-count': __, ...headers } = delivery.properties.headers ?? {};
    const dead = { ...headers, 'ws-dead-consumer': this.consumer, 'ws-dead-reason': reason,
      'ws-dead-error': Buffer.from(error ?? '').subarray(0, 1_000).toString()
        .replace(/\uFFFD+$/, ''), 'ws-dead-failures': failed };
    try {
      await publish(this.#broker, onFailure.exchange, onFailure.routingKey, delivery, dead);
    } catch (refused) {
      this.#log('error', 'cannot dead-letter', { error: describe(refused) }, message);
      return { next: 'dead_letter', wait: Math.min(maxBackoff, backoff * 2 ** job.conflicts++) };
    }
    this.#tell('error', 'dead_lettered', message, error, { reason });
    // Moved back from there, it starts from the beginning.
    await this.#begin(over, (c) => call(c, 'end_message', this.consumer, message.id))
      // At a stop it is acknowledged all the same: the dead letter is sent.
      .catch((left: unknown) => { if (left !== LEFT) throw left; });
    return { next: 'sent', wait: 0 };
  }

  /** Work with the database, unless no more is to be begun. */
  #begin<T>(over: AbortSignal, work: (client: PoolClient) => Promise<T>): Promise<T> {
    return this.#inSlot(async () => {
      if (over.aborted) throw LEFT;
      return this.#database.run(work);
    });
  }

  /** Retries parked messages, and lets the window of the inbox move on once an hour. */
  async #upkeep(): Promise<void> {
    const { signal } = this.#stop;
    for (let maintained = performance.now(); !signal.aborted;) {
      const isDone = this.#database.isOpen && await this.#begin(signal, async (client) => {
        if (performance.now() - maintained > 3_600_000) {
          maintained = performance.now();
          await maintain(client);
        }
        return (await client.query('SELECT retried::text, message_id, seconds, key, body, '
          + 'properties::text FROM watership_inbox.next_retry($1)', [this.consumer])).rows[0];
      }).then(async (row) => row && this.#work({ retried: row.retried, conflicts: 0, failed: 0,
        message: new Message(row.message_id, row.seconds && new Date(row.seconds * 1_000), row.key,
          row.body, JSON.parse(row.properties), true) }, signal).then(() => true)).catch(ignore);
      if (!isDone) await pause(1_000, signal);
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
