// A consumer: each message has its effect once, in order within its key, whatever crashes: see
// clients/README.md. It handles one message at a time; for more, start several, on the partitions of
// a route. The packages do in addition: keys side by side, dead letters (this one parks), counters,
// a prefetch by the broker's version; and headers of parked messages keep their types (here they are
// texts then). For Java 17, amqp-client 5 and pgjdbc 42.

import com.rabbitmq.client.ConnectionFactory;
import com.rabbitmq.client.Delivery;
import java.net.URI;
import java.security.MessageDigest;
import java.sql.*;
import java.time.*;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.AtomicBoolean;
import java.util.stream.Collectors;

public final class Consumer {
    static final String NAME = System.getenv("CONSUMER"), QUEUE = System.getenv("QUEUE");
    static final CountDownLatch stop = new CountDownLatch(1), ended = new CountDownLatch(1);

    @SuppressWarnings("serial") // an error of the handler that another try would not change
    static final class Permanent extends Exception {}

    // `properties` is JSON: exchange, routing_key, headers (with traceparent), …; `retried` numbers
    // one that was parked; `begins`: it came back, or has no id, and is not begun.
    record Message(String id, Object time, String key, byte[] body, String properties,
        Long retried, AtomicBoolean begins, boolean hasId) {}

    // What it does on this connection has its effect once; it does not commit. When it throws, it
    // is called again, and in the end the message is parked with its key; at once if it throws
    // Permanent. (This one is for the crash test.)
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

    static Message read(Delivery d) throws Exception {
        var p = d.getProperties();
        var headers = p.getHeaders() == null ? Map.<String, Object>of() : p.getHeaders();
        var key = headers.get("ws-key");
        var again = d.getEnvelope().isRedeliver()
            || headers.get("x-delivery-count") instanceof Number n && n.longValue() > 0;
        // The client reads what is not UTF-8 as U+FFFD: different ids would become one.
        var id = p.getMessageId();
        var hasId = id != null && !id.isEmpty() && id.indexOf(0) < 0 && id.indexOf('\uFFFD') < 0;
        var hash = MessageDigest.getInstance("SHA-256").digest(d.getBody());
        var kept = new HashMap<String, Object>(Map.of("headers", headers));
        kept.put("exchange", d.getEnvelope().getExchange());
        kept.put("routing_key", d.getEnvelope().getRoutingKey());
        kept.put("type", p.getType());
        kept.put("content_type", p.getContentType());
        return new Message(hasId ? id : "sha256-" + HexFormat.of().formatHex(hash),
            p.getTimestamp() == null ? null : new Timestamp(p.getTimestamp().getTime()),
            key == null ? null : clean(key), d.getBody(), json(kept), null,
            new AtomicBoolean(again || !hasId), hasId);
    }

    static String clean(Object text) { // of NUL, which Postgres cannot store
        return ("" + text).replace('\0', '\uFFFD');
    }

    static String json(Object value) {
        return value == null ? "null" : value instanceof Map<?, ?> map ? map.entrySet().stream()
            .map(e -> json("" + e.getKey()) + ":" + json(e.getValue()))
            .collect(Collectors.joining(",", "{", "}"))
            : clean(value).chars().mapToObj(c -> c == '"' || c == '\\' || c < ' '
                ? String.format("\\u%04x", c) : "" + (char) c)
            .collect(Collectors.joining("", "\"", "\""));
    }

    // From DATABASE_URL, in the form postgres://user:password@host:port/database?sslmode=…
    static Connection open() throws SQLException {
        var url = URI.create(System.getenv("DATABASE_URL"));
        var login = (url.getUserInfo() + ":").split(":");
        var c = DriverManager.getConnection("jdbc:postgresql://" + url.getAuthority().replaceAll(
            ".*@", "") + url.getRawPath() + "?tcpKeepAlive=true&"
            + Objects.requireNonNullElse(url.getRawQuery(), ""), login[0],
            login.length > 1 ? login[1] : "");
        c.setAutoCommit(false);
        return c;
    }

    // The first row, or null.
    static Object[] ask(Connection c, String select, Object... arguments) throws SQLException {
        try (var statement = c.prepareStatement("SELECT " + select)) {
            for (int i = 0; i < arguments.length; i++) {
                statement.setObject(i + 1, arguments[i]);
            }
            try (var rows = statement.executeQuery()) {
                var row = new Object[rows.getMetaData().getColumnCount()];
                var found = rows.next();
                for (int i = 0; found && i < row.length; i++) {
                    row[i] = rows.getObject(i + 1);
                }
                return found ? row : null;
            }
        }
    }

    // A function that gets the whole message, and says what is to be done next.
    static String ask(Connection c, Message m, String function, Object... more)
        throws SQLException {
        var all = new ArrayList<Object>(Arrays.asList(
            NAME, m.id, m.time, m.key, m.body, m.properties, m.retried));
        all.addAll(Arrays.asList(more));
        return (String) ask(c, "next FROM watership_inbox." + function
            + "(?, ?, ?, ?, ?, ?::jsonb, ?::bigint" + ", ?".repeat(more.length) + ")",
            all.toArray())[0];
    }

    // One attempt, and what is to be done then. Throws where the connection is lost.
    static String attempt(Connection c, Message m, int tries) throws SQLException {
        try {
            if (m.begins.get()) {
                var next = ask(c, m, "begin_message", m.hasId);
                c.commit();
                m.begins.set(false);
                if (!next.equals("handle")) {
                    return next;
                }
            }
            var next = ask(c, m, "receive_message");
            if (next.equals("handle")) {
                var savepoint = c.setSavepoint();
                handle(c, m);
                c.releaseSavepoint(savepoint); // fails if the handler hid an error
                ask(c, "watership_inbox.end_message(?, ?, ?::bigint)", NAME, m.id, m.retried);
            }
            c.commit();
            return next;
        } catch (Exception e) {
            c.rollback();
            System.err.printf("failed: %s of key %s: %s%n", m.id, m.key, e);
            String state = null;
            for (Throwable t = e; t != null; t = t.getCause()) { // JPA and Spring wrap it
                state = t instanceof SQLException sql ? sql.getSQLState() : state;
            }
            var next = ask(c, m, "fail_message", clean(e), e instanceof Permanent, 5, false, state,
                tries);
            c.commit();
            return next;
        }
    }

    // Tries until it is handled or parked, or the program stops.
    static void work(Connection c, Message m) throws Exception {
        for (int tries = 1; attempt(c, m, tries).equals("again"); tries++) {
            pause((long) (Math.random() * Math.min(100 << Math.min(tries - 1, 20), 10_000)));
            if (stop.getCount() == 0) {
                throw new InterruptedException("stopped; the message comes again");
            }
        }
    }

    static void pause(long milliseconds) throws InterruptedException {
        stop.await(milliseconds, TimeUnit.MILLISECONDS);
    }

    // Handles messages, one after the other, until a connection is lost.
    static void consume() throws Exception {
        var factory = new ConnectionFactory();
        factory.setUri(System.getenv("AMQP_URL"));
        factory.setAutomaticRecoveryEnabled(false); // it would hide what was lost
        factory.setRequestedHeartbeat(5);
        var deliveries = new LinkedBlockingQueue<Optional<Delivery>>();
        // Closing the connection is the end, without a cancel before it.
        try (var c = open(); var broker = factory.newConnection()) {
            // Of the newest file in sql/inbox that is used here.
            if ((boolean) ask(c, "to_regproc('watership_inbox.suspect') IS NULL")[0]) {
                throw new IllegalStateException("the inbox schema is older than this program: "
                    + "run watership inbox install");
            }
            maintain(c);
            var channel = broker.createChannel();
            // RabbitMQ before 4.3 redelivers several messages out of order.
            channel.basicQos("true".equals(System.getenv("ORDERED")) ? 1 : 50);
            channel.basicConsume(QUEUE, false, (tag, d) -> deliveries.add(Optional.of(d)),
                tag -> deliveries.add(Optional.empty()),
                (tag, cause) -> deliveries.add(Optional.empty()));
            long heard = System.nanoTime(), next = heard;
            var retrying = false;
            for (int second = 1; stop.getCount() > 0;) {
                var delivery = deliveries.poll(retrying ? 0 : 100, TimeUnit.MILLISECONDS);
                if (delivery != null) {
                    var d = delivery.orElseThrow(); // cancelled by the broker, or closed
                    work(c, read(d));
                    channel.basicAck(d.getEnvelope().getDeliveryTag(), false);
                    heard = System.nanoTime();
                }
                var isDue = System.nanoTime() >= next;
                retrying = (retrying || isDue) && retry(c); // one, then a delivery again
                if (!isDue) {
                    continue;
                }
                next = System.nanoTime() + 1_000_000_000;
                if (second++ % 3600 == 0) {
                    maintain(c);
                }
                if (second % 15 == 0) { // does the broker know of us?
                    var q = channel.queueDeclarePassive(QUEUE);
                    if (q.getMessageCount() > 0 && (q.getConsumerCount() == 0
                        || System.nanoTime() - heard > 30e9)) {
                        throw new IllegalStateException("messages wait, and none comes");
                    }
                }
            }
        }
    }

    // Retries the next message that an operator marked. False if there is none.
    static boolean retry(Connection c) throws Exception {
        var row = ask(c, "message_id, to_timestamp(seconds), key, body, properties::text, "
            + "retried FROM watership_inbox.next_retry(?)", NAME);
        c.commit();
        if (row != null) {
            work(c, new Message((String) row[0], row[1], (String) row[2], (byte[]) row[3],
                (String) row[4], (Long) row[5], new AtomicBoolean(true), true));
        }
        return row != null;
    }

    // Lets the window of the inbox move on.
    static void maintain(Connection c) throws SQLException {
        boolean more;
        do {
            more = (boolean) ask(c, "(watership_inbox.maintain()).more")[0];
            c.commit();
        } while (more);
    }

    public static void main(String[] arguments) throws Exception {
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            stop.countDown();
            try {
                ended.await(30, TimeUnit.SECONDS);
            } catch (InterruptedException e) {
                // The JVM ends in any case.
            }
        }));
        for (int failures = 0; stop.getCount() > 0; failures++) {
            var began = System.nanoTime();
            try {
                consume();
            } catch (Exception e) {
                System.err.println("subscription lost: " + e);
            }
            failures = System.nanoTime() - began > 10e9 ? 0 : failures;
            pause(Math.min(100 << Math.min(failures, 10), 5_000));
        }
        ended.countDown();
    }
}
