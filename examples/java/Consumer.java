// A consumer: each message has its effect once, in order within its key, whatever crashes. This
// file is yours; take the others as they are. For Java 17, amqp-client 5 and pgjdbc 42.

import java.sql.Connection;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;

public final class Consumer {
    static volatile boolean stopping;
    static volatile Subscription current;

    // What it does on this connection has its effect once; it does not commit. When it throws, it
    // is called again, and in the end the message is parked with its key; at once if it throws
    // Inbox.Permanent. (This one is for the crash test.)
    static void handle(Connection transaction, Message message) throws Exception {
        try (var insert = transaction.prepareStatement("""
                INSERT INTO watership_torture.effect (message_id, key, number)
                SELECT ?, e ->> 'key', (e ->> 'number')::bigint
                FROM CAST(convert_from(?, 'UTF8') AS json) AS e""")) {
            insert.setString(1, message.id);
            insert.setBytes(2, message.body);
            insert.executeUpdate();
        }
    }

    public static void main(String[] arguments) throws Exception {
        var ended = new CountDownLatch(1);
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            stopping = true;
            try {
                current.lost.complete("stopping");
                ended.await(30, TimeUnit.SECONDS);
            } catch (Exception e) {
                // The JVM ends in any case.
            }
        }));
        for (long wait = 100; !stopping; wait = Math.min(2 * wait, 5000)) {
            var began = System.nanoTime();
            current = new Subscription();
            var cause = current.consume();
            if (!stopping) {
                System.err.println("subscription lost: " + cause);
                wait = System.nanoTime() - began > 5e9 ? 100 : wait;
                Thread.sleep(wait);
            }
        }
        ended.countDown();
    }
}
