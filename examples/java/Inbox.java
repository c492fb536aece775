// What the inbox in the database is asked about a message, and told.

import java.sql.Connection;
import java.sql.SQLException;
import java.time.OffsetDateTime;
import java.util.concurrent.ThreadLocalRandom;

final class Inbox {
    static final String CONSUMER = System.getenv("CONSUMER");
    static final int MAX_FAILURES = 5, MAX_KILLS = 10, MAX_CONFLICTS = 10;

    private Inbox() {}

    // An error of the handler that another try would not change.
    @SuppressWarnings("serial")
    static final class Permanent extends Exception {
        Permanent(String message) {
            super(message);
        }
    }

    // An attempt begins, at a message that came back: what ends the process each time is given up.
    private static void started(Connection c, Message m) throws SQLException {
        var row = Database.ask(c, "failed, killed FROM watership_inbox.attempt_started(?, ?)",
            CONSUMER, m.id);
        c.commit();
        m.again = false;
        m.recorded = true;
        m.failures = (int) row[0];
        if ((int) row[1] >= MAX_KILLS) {
            m.reason = "killed";
            m.why = row[1] + " processes ended while they handled it";
        }
    }

    private static void receive(Connection c, Message m) throws Exception {
        var verdict = m.reason != null ? m.reason : Database.ask(c,
            "watership_inbox.receive(?, ?, ?, ?, ?, ?::jsonb)",
            CONSUMER, m.id, m.time, m.key, m.body, m.properties)[0];
        if (verdict.equals("handle")) {
            // By the savepoint, nothing of the key passes before the message is parked. Its release
            // fails where the handler hid an error of a statement: a commit would then roll back.
            var savepoint = c.setSavepoint();
            try {
                Consumer.handle(c, m);
                c.releaseSavepoint(savepoint);
            } catch (Exception e) {
                if (m.failures + 1 < MAX_FAILURES || Database.isConflict(e)) {
                    throw e;
                }
                c.rollback(savepoint);
                m.reason = "failed";
                m.why = "" + e;
            }
        }
        if (m.reason != null) {
            Database.ask(c, "watership_inbox.park(?, ?, ?, ?, ?, ?, ?, ?::jsonb)", CONSUMER, m.id,
                m.time, m.key, m.reason, m.why, m.body, m.properties);
        } else if (m.recorded) {
            Database.ask(c, "watership_inbox.attempt_ended(?, ?)", CONSUMER, m.id);
        }
    }

    // One try, to the commit. False: another is needed. Throws where the connection is lost.
    static boolean attempt(Connection c, Message m) throws SQLException {
        try {
            if (m.again && m.reason == null) {
                started(c, m);
            }
            receive(c, m);
            c.commit();
            if (m.reason != null) {
                System.err.printf("parked: %s of key %s (%s): %s%n", m.id, m.key, m.reason, m.why);
            }
            return true;
        } catch (Exception e) {
            c.rollback();
            if (Database.isConflict(e) && ++m.conflicts < MAX_CONFLICTS) {
                return false;
            }
            System.err.printf("failed: %s of key %s: %s%n", m.id, m.key, e);
            if (Database.isState(e, "WI003")) { // nobody has called it for weeks
                maintain(m.time);
                return false;
            }
            m.recorded = true;
            m.failures = (int) Database.ask(c, "watership_inbox.attempt_failed(?, ?, ?)",
                CONSUMER, m.id, "" + e)[0];
            c.commit();
            if (m.failures >= MAX_FAILURES || e instanceof Permanent) {
                m.reason = "failed";
                m.why = "" + e;
            }
            return false;
        }
    }

    // Handles the next parked message of a key that an operator marked for retry, if there is one.
    static boolean retry(Connection c, Connection side) throws SQLException {
        var row = Database.ask(c, """
            id, message_id, key, body, properties::text FROM watership_inbox.retry_next(?)""", CONSUMER);
        if (row == null) {
            c.commit(); // a key without messages is live again
            return false;
        }
        var message = new Message(row);
        try {
            started(side, message);
            if (message.reason != null) {
                throw new IllegalStateException(message.why);
            }
            Consumer.handle(c, message);
            Database.ask(c, "watership_inbox.retry_done(?)", row[0]);
            c.commit();
            return true;
        } catch (Exception e) {
            c.rollback();
            if (!Database.isConflict(e)) {
                System.err.printf("retry failed: %s of key %s: %s%n", message.id, message.key, e);
                Database.ask(side, "watership_inbox.retry_failed(?, ?)", row[0], "" + e);
                side.commit();
            }
            return false;
        }
    }

    // Milliseconds before the next try: 100, doubled up to 10 s, with full jitter.
    static long backoff(Message m) {
        var most = Math.min(10_000, 100L << Math.min(m.failures, 7));
        return ThreadLocalRandom.current().nextLong(most);
    }

    // Lets the window of remembered messages move on; to a message that it could not take, if given.
    static void maintain(OffsetDateTime seen) throws SQLException {
        try (var c = Database.open()) {
            for (var more = true; more; c.commit()) {
                more = (boolean) Database.ask(c, "more FROM watership_inbox.maintain(?)", seen)[0];
            }
        }
    }
}
