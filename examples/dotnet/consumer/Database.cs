// Not covered by tests. Npgsql in short form.

using Npgsql;

internal static class Database
{
    // Npgsql takes no URL. Of DATABASE_URL it gets all but the options.
    internal static NpgsqlDataSource Create()
    {
        var url = new Uri(Environment.GetEnvironmentVariable("DATABASE_URL")!);
        var login = url.UserInfo.Split(':', 2).Select(Uri.UnescapeDataString).ToArray();
        return NpgsqlDataSource.Create(new NpgsqlConnectionStringBuilder
        {
            Host = url.Host,
            Port = url.Port < 0 ? 5432 : url.Port,
            Username = login[0],
            Password = login.Length > 1 ? login[1] : null,
            Database = Uri.UnescapeDataString(url.AbsolutePath.TrimStart('/')),
            MaxPoolSize = Subscription.Concurrency + 4, // for retries and housekeeping
            KeepAlive = 10,
        });
    }

    private static NpgsqlCommand Command(NpgsqlConnection c, string select, object?[] arguments)
    {
        var command = new NpgsqlCommand("SELECT " + select, c); // in the connection's transaction
        foreach (var argument in arguments)
        {
            command.Parameters.Add(new NpgsqlParameter { Value = argument ?? DBNull.Value });
        }
        return command;
    }

    // The first row, or null.
    internal static async Task<object[]?> AskAsync(
        this NpgsqlConnection c, string select, params object?[] arguments)
    {
        await using var command = Command(c, select, arguments);
        await using var reader = await command.ExecuteReaderAsync();
        if (!await reader.ReadAsync())
        {
            return null;
        }
        var row = new object[reader.FieldCount];
        reader.GetValues(row);
        return row;
    }

    internal static async Task TellAsync(
        this NpgsqlConnection c, string select, params object?[] arguments)
    {
        await using var command = Command(c, select, arguments);
        await command.ExecuteNonQueryAsync();
    }

    // A conflict of two transactions is no fault of the handler.
    internal static bool IsConflict(Exception? e) =>
        e is PostgresException { SqlState: "40001" or "40P01" }
        || e is not null && IsConflict(e.InnerException);
}
