// A producer: the event exists exactly when the transaction commits. With Spring, in a method that
// is @Transactional, after the change:
//     jdbcTemplate.queryForObject(
//         "SELECT watership.emit('order', ?, 'paid', ?)", UUID.class, id, json);
// With JPA, likewise; flush first, so that the change comes before its event:
//     entityManager.flush();
//     entityManager
//         .createNativeQuery("SELECT CAST(watership.emit('order', ?1, 'paid', ?2) AS text)")
//         .setParameter(1, id).setParameter(2, json).getSingleResult();

import java.sql.Connection;
import java.sql.SQLException;

public final class Producer {
    private Producer() {}

    static void pay(Connection connection, long order) throws SQLException {
        try {
            // The change comes first: by its row lock, events of an order come in the order of commits.
            try (var change = connection.prepareStatement(
                    "UPDATE orders SET state = 'paid' WHERE id = ?")) {
                change.setLong(1, order);
                change.executeUpdate();
            }
            try (var emit = connection.prepareStatement(
                    "SELECT watership.emit('order', ?, 'paid', ?)")) {
                emit.setLong(1, order);
                emit.setString(2, "{\"id\": " + order + ", \"state\": \"paid\"}");
                emit.execute();
            }
            connection.commit();
        } catch (SQLException e) {
            connection.rollback();
            throw e;
        }
    }

    public static void main(String[] arguments) throws SQLException {
        try (var connection = Consumer.open()) {
            pay(connection, 7);
        }
    }
}
