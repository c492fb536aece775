// What it does is in clients/README.md. Left out: dead_letter (it parks), counters (it logs).

import com.rabbitmq.client.Channel;
import com.rabbitmq.client.ConnectionFactory;
import java.sql.Connection;
import java.sql.SQLException;
import java.util.concurrent.*;
import java.util.concurrent.atomic.AtomicInteger;

// With connections of its own. When `lost` is complete, nothing new begins.
final class Subscription {
    static final String QUEUE = System.getenv("QUEUE");
    static final int CONCURRENCY = 8;
    static final CompletableFuture<Void> NOTHING = CompletableFuture.completedFuture(null);

    final CompletableFuture<String> lost = new CompletableFuture<>();
    final BlockingQueue<Connection> connections = new LinkedBlockingQueue<>();
    final ConcurrentMap<String, CompletableFuture<Void>> lanes = new ConcurrentHashMap<>();
    final ExecutorService handlers = Executors.newCachedThreadPool();
    final ScheduledExecutorService timers = Executors.newScheduledThreadPool(3);
    final AtomicInteger inHand = new AtomicInteger();
    volatile long heard = System.nanoTime();

    String consume() {
        com.rabbitmq.client.Connection broker = null;
        try (var retries = Database.open(); var side = Database.open()) {
            Database.ask(side, "watership_inbox.register(?)", Inbox.CONSUMER);
            side.commit();
            for (int i = 0; i < CONCURRENCY; i++) {
                connections.add(Database.open());
            }
            var factory = new ConnectionFactory();
            factory.setUri(System.getenv("AMQP_URL"));
            factory.setAutomaticRecoveryEnabled(false); // it would hide what was lost
            factory.setRequestedHeartbeat(5);
            broker = factory.newConnection();
            subscribe(broker.createChannel());
            var watch = broker.createChannel();
            every(15, "watchdog", () -> {
                var q = watch.queueDeclarePassive(QUEUE);
                var idle = inHand.get() == 0 && System.nanoTime() - heard > 30e9;
                if (q.getMessageCount() > 0 && (q.getConsumerCount() == 0 || idle)) {
                    lost.complete("watchdog: messages wait, and none comes");
                }
            });
            every(1, "database", () -> {
                while (!lost.isDone() && Inbox.retry(retries, side)) {}
            });
            every(3600, "database", () -> Inbox.maintain(null));
            var cause = lost.get();
            timers.shutdown();
            while (Consumer.stopping && inHand.get() > 0) {
                Thread.sleep(10); // what has begun may end
            }
            timers.awaitTermination(30, TimeUnit.SECONDS);
            return cause;
        } catch (Exception e) {
            return e + (e.getCause() == null ? "" : ": " + e.getCause().getMessage());
        } finally {
            lost.complete("");
            timers.shutdown();
            handlers.shutdown();
            close();
            if (broker != null) {
                broker.abort(2000);
            }
        }
    }

    void subscribe(Channel channel) throws Exception {
        // RabbitMQ before 4.3 redelivers several messages out of order.
        channel.basicQos("true".equals(System.getenv("ORDERED")) ? 1 : 50);
        channel.basicConsume(QUEUE, false, (tag, delivery) -> {
            heard = System.nanoTime();
            inHand.incrementAndGet();
            var message = new Message(delivery);
            var before = lanes.getOrDefault(message.lane(), NOTHING);
            var last = before.thenRunAsync(guarded("database", () -> {
                if (deliver(message)) {
                    channel.basicAck(delivery.getEnvelope().getDeliveryTag(), false);
                }
            }), handlers);
            lanes.put(message.lane(), last);
            last.whenComplete((none, error) -> {
                lanes.remove(message.lane(), last);
                inHand.decrementAndGet();
            });
        }, tag -> lost.complete("cancelled by the broker"),
            (tag, cause) -> lost.complete("closed: " + cause.getMessage()));
    }

    // Tries until the message is handled or parked. False: the subscription was lost before.
    boolean deliver(Message message) throws Exception {
        while (!lost.isDone()) {
            var c = connections.poll(1, TimeUnit.SECONDS);
            if (c == null) {
                continue;
            }
            boolean handled;
            try {
                handled = Inbox.attempt(c, message);
            } catch (Throwable e) {
                c.close(); // nobody may commit what was begun on it
                throw e;
            }
            connections.add(c);
            if (lost.isDone()) {
                close();
            }
            if (handled) {
                return true;
            }
            try {
                lost.get(Inbox.backoff(message), TimeUnit.MILLISECONDS);
            } catch (TimeoutException e) {
                // Time for the next try.
            }
        }
        return false;
    }

    private void close() {
        for (Connection c; (c = connections.poll()) != null;) {
            try {
                c.close();
            } catch (SQLException e) {
                // It was lost.
            }
        }
    }

    interface Work {
        void run() throws Exception;
    }

    private Runnable guarded(String cause, Work work) {
        return () -> {
            try {
                work.run();
            } catch (Throwable e) {
                lost.complete(cause + ": " + e);
            }
        };
    }

    private void every(int seconds, String cause, Work work) {
        timers.scheduleWithFixedDelay(guarded(cause, work), 0, seconds, TimeUnit.SECONDS);
    }
}
