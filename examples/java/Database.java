// JDBC in short form.

import java.net.URI;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.SQLException;
import java.util.List;
import java.util.Properties;

final class Database {
    private Database() {}

    // From DATABASE_URL, in the form postgres://user:password@host:port/database?sslmode=…
    static Connection open() throws SQLException {
        var url = URI.create(System.getenv("DATABASE_URL"));
        var login = (url.getUserInfo() == null ? "postgres" : url.getUserInfo()).split(":", 2);
        var properties = new Properties();
        properties.setProperty("user", login[0]);
        properties.setProperty("password", login.length > 1 ? login[1] : "");
        properties.setProperty("tcpKeepAlive", "true");
        var connection = DriverManager.getConnection("jdbc:postgresql://" + url.getHost() + ":"
            + (url.getPort() < 0 ? 5432 : url.getPort()) + url.getRawPath()
            + (url.getRawQuery() == null ? "" : "?" + url.getRawQuery()), properties);
        connection.setAutoCommit(false);
        return connection;
    }

    // The first row of a SELECT, or null.
    static Object[] ask(Connection connection, String select, Object... arguments)
        throws SQLException {
        try (var statement = connection.prepareStatement("SELECT " + select)) {
            for (int i = 0; i < arguments.length; i++) {
                statement.setObject(i + 1, arguments[i]);
            }
            try (var rows = statement.executeQuery()) {
                if (!rows.next()) {
                    return null;
                }
                var row = new Object[rows.getMetaData().getColumnCount()];
                for (int i = 0; i < row.length; i++) {
                    row[i] = rows.getObject(i + 1);
                }
                return row;
            }
        }
    }

    static boolean isState(Throwable e, String... states) {
        return e instanceof SQLException sql && List.of(states).contains("" + sql.getSQLState())
            || e.getCause() != null && isState(e.getCause(), states);
    }

    // A conflict of two transactions is no fault of the handler.
    static boolean isConflict(Throwable e) {
        return isState(e, "40001", "40P01");
    }
}
