// The broker's side: a connection that is opened again, and subscriptions that never end silently.
import { setMaxListeners } from 'node:events';
import type { Duplex } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import amqp, { type Channel, type ChannelModel, type ConsumeMessage, type SocketOptions }
  from 'amqplib';

/** Why a subscription ended. */
type Cause =
  'cancelled' | 'channel_closed' | 'connection_lost' | 'watchdog' | 'database' | 'stopped';

export const ignore = (): void => {};

/** Waits, in ms, or until the signal is aborted. */
export const pause = (ms: number, signal?: AbortSignal): Promise<void> =>
  sleep(ms, undefined, signal && { signal }).catch(ignore);

/** Rejects after `ms`, if the work has not ended. */
export const within = <T>(ms: number, what: string, work: Promise<T>): Promise<T> =>
  Promise.race([work, sleep(ms, undefined, { ref: false }).then(() => {
    throw new Error(`${what}: not done within ${ms} ms`);
  })]);

/** After so many ms a silent broker is given up. */
const SILENCE_LIMIT = 4_000;

/** A connection, opened when it is asked for and not there. */
export class Connection {
  #model: ChannelModel | undefined;

  constructor(readonly url: string, readonly name: string, readonly socket: SocketOptions) {}

  async open(): Promise<ChannelModel> {
    if (this.#model) return this.#model;
    const url = new URL(this.url);
    // In seconds; amqplib notices a dead peer after two or three.
    if (!url.searchParams.has('heartbeat')) url.searchParams.set('heartbeat', '3');
    const model = await amqp.connect(url.href, { timeout: SILENCE_LIMIT, noDelay: true,
      clientProperties: { connection_name: this.name }, ...this.socket });
    const gone = (): void => { if (this.#model === model) this.#model = undefined; };
    model.on('error', gone).on('close', gone);
    return this.#model = model;
  }

  async close(): Promise<void> {
    const model = this.#model;
    this.#model = undefined;
    if (model) await within(SILENCE_LIMIT, 'closing', model.close()).catch(ignore);
    // The socket to a dead peer would keep the process alive for minutes.
    (model?.connection as { stream?: Duplex } | undefined)?.stream?.destroy();
  }

  /** Publishes a message again, to where a queue must be bound, and waits for the confirm. */
  async publish(exchange: string, routingKey: string, { content, properties }: ConsumeMessage,
    headers: { [name: string]: unknown }): Promise<void> {
    const channel = await (await this.open()).createConfirmChannel();
    let returned = false;
    channel.on('error', ignore).on('return', () => { returned = true; });
    // The broker refuses the user id of another; and what is kept must not expire.
    const { userId: _, expiration: __, ...options } = { ...properties, headers, mandatory: true };
    await new Promise<void>((resolve, reject) => {
      channel.publish(exchange, routingKey, content, options, (e) => e ? reject(e) : resolve());
    }).finally(() => void channel.close().catch(ignore));
    if (returned) throw new Error(`${exchange || 'the default exchange'} has no ${routingKey}`);
  }
}

/** A consumer on a channel of its own. Once lost, it is never used again. */
export class Subscription {
  /** Messages that were delivered and are not done with. */
  inHand = 0;
  /** Set when it is lost. */
  cause: Cause | undefined;
  readonly #over = new AbortController();
  #lastDelivery = performance.now();

  private constructor(readonly connection: Connection, readonly model: ChannelModel,
    readonly channel: Channel, readonly queue: string) {
    setMaxListeners(0, this.over);
    channel.on('error', () => this.lose('channel_closed'));
    // amqplib closes the channels of a lost connection before it tells of the connection.
    channel.on('close', () => setImmediate(() => this.lose('channel_closed')));
    model.on('error', () => this.lose('connection_lost'));
    model.on('close', () => this.lose('connection_lost'));
  }

  static async open(connection: Connection, queue: string, prefetch: (version: string) => number,
    deliver: (delivery: ConsumeMessage, from: Subscription) => void): Promise<Subscription> {
    const model = await connection.open();
    const made = new Subscription(connection, model, await model.createChannel(), queue);
    await made.channel.prefetch(prefetch(model.connection.serverProperties.version));
    await made.channel.consume(queue, (delivery) => {
      // The broker cancels a consumer with null.
      if (!delivery) return made.lose('cancelled');
      made.inHand += 1;
      made.#lastDelivery = performance.now();
      deliver(delivery, made);
    });
    return made;
  }

  /** Aborted when no more messages are to be begun. */
  get over(): AbortSignal { return this.#over.signal; }

  windDown(): void { this.#over.abort(); }

  lose(cause: Cause): void {
    this.cause ??= cause;
    this.windDown();
  }

  /** On the channel that the message came from, or not at all: then it comes again. */
  ack(delivery: ConsumeMessage): void {
    try {
      if (!this.cause) this.channel.ack(delivery);
    } catch {
      this.lose('channel_closed');
    }
  }

  /** Closes the channel without a cancel before it: its messages go back together, in order. */
  async close(): Promise<void> {
    await within(SILENCE_LIMIT, 'closing', this.channel.close()).catch(async (error: unknown) => {
      // Closed already; or nobody answers, and then the connection is dead.
      if (!(error instanceof amqp.IllegalOperationError)) await this.connection.close();
    });
  }

  /** Finds messages that wait and are not delivered, though nobody told us of a loss. */
  async watch(every: number, idle: number): Promise<void> {
    for (await pause(every, this.over); !this.over.aborted; await pause(every, this.over)) {
      const look = this.model.createChannel().then(async (channel) => {
        channel.on('error', ignore);
        const { messageCount, consumerCount } = await channel.checkQueue(this.queue);
        const isIdle = this.inHand === 0 && performance.now() - this.#lastDelivery >= idle;
        if (messageCount > 0 && (consumerCount === 0 || isIdle)) this.lose('watchdog');
        await channel.close();
      });
      await within(SILENCE_LIMIT, 'watchdog', look).catch(() => this.lose('watchdog'));
    }
  }
}
