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
/** The leader of a quorum queue may take its time to accept a consumer, in ms. */
const SUBSCRIBE_LIMIT = 20_000;

export interface Broker { url: string; name: string; socket: SocketOptions }

async function connect({ url: given, name, socket }: Broker): Promise<ChannelModel> {
  const url = new URL(given);
  // In seconds; amqplib notices a dead peer after two or three.
  if (!url.searchParams.has('heartbeat')) url.searchParams.set('heartbeat', '3');
  const model = await amqp.connect(url.href, { timeout: SILENCE_LIMIT, noDelay: true,
    clientProperties: { connection_name: name }, ...socket });
  return model.on('error', ignore);
}

async function disconnect(model: ChannelModel): Promise<void> {
  await within(SILENCE_LIMIT, 'closing', model.close()).catch(ignore);
  // The socket to a dead peer would keep the process alive for minutes.
  (model.connection as { stream?: Duplex }).stream?.destroy();
}

/** Publishes a message again, to where a queue must be bound, and waits for the confirm. On a
 *  connection of its own: a broker short of memory does not read from those that publish. */
export async function publish(broker: Broker, exchange: string, routingKey: string,
  { content, properties }: ConsumeMessage, headers: { [name: string]: unknown }): Promise<void> {
  const model = await connect(broker);
  try {
    const channel = await model.createConfirmChannel();
    let returned = false;
    channel.on('error', ignore).on('return', () => { returned = true; });
    // The broker refuses the user id of another; and what is kept must not expire.
    const { userId: _, expiration: __, ...options } = { ...properties, headers, mandatory: true };
    await new Promise<void>((resolve, reject) => {
      channel.publish(exchange, routingKey, content, options, (e) => e ? reject(e) : resolve());
    });
    if (returned) throw new Error(`${exchange || 'the default exchange'} has no ${routingKey}`);
  } finally {
    await disconnect(model);
  }
}

/** A consumer on a connection of its own. Once lost, it is never used again. */
export class Subscription {
  /** Messages that were delivered and are not done with. */
  inHand = 0;
  /** Set when it is lost. */
  cause: Cause | undefined;
  readonly #over = new AbortController();
  #lastDelivery = performance.now();

  private constructor(readonly model: ChannelModel, readonly channel: Channel,
    readonly queue: string) {
    setMaxListeners(0, this.over);
    channel.on('error', () => this.lose('channel_closed'));
    // amqplib closes the channels of a lost connection before it tells of the connection.
    channel.on('close', () => setImmediate(() => this.lose('channel_closed')));
    model.on('error', () => this.lose('connection_lost'));
    model.on('close', () => this.lose('connection_lost'));
  }

  static async open(broker: Broker, queue: string, prefetch: (version: string) => number,
    deliver: (delivery: ConsumeMessage, from: Subscription) => void): Promise<Subscription> {
    const model = await connect(broker);
    const subscribe = async (): Promise<Subscription> => {
      const made = new Subscription(model, await model.createChannel(), queue);
      await made.channel.prefetch(prefetch(model.connection.serverProperties.version));
      await made.channel.consume(queue, (delivery) => {
        // The broker cancels a consumer with null.
        if (!delivery) return made.lose('cancelled');
        made.inHand += 1;
        made.#lastDelivery = performance.now();
        deliver(delivery, made);
      });
      return made;
    };
    // Also the end of a consumer that would be accepted later.
    return within(SUBSCRIBE_LIMIT, 'subscribing', subscribe()).catch(async (error: unknown) => {
      await disconnect(model);
      throw error;
    });
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

  /** Closes without a cancel before it: its messages go back together, in order. */
  async close(): Promise<void> {
    // First the channel: that its acknowledgements arrive.
    await within(SILENCE_LIMIT, 'closing', this.channel.close()).catch(ignore);
    await disconnect(this.model);
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
