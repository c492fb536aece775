// Not covered by tests. What the inbox in the database is asked about a message, and told.

using System.Data;
using Npgsql;

internal static class Inbox
{
    internal static readonly string Name = Environment.GetEnvironmentVariable("CONSUMER")!;
    private const int MaxFailures = 5, MaxKills = 10, MaxConflicts = 10;

    // An attempt begins, at a message that came back: what ends the process each time is given up.
    private static async Task StartedAsync(NpgsqlConnection c, Message m)
    {
        var row = await c.AskAsync(
            "failed, killed FROM watership_inbox.attempt_started($1, $2)", Name, m.Id);
        (m.Again, m.Recorded, m.Failures) = (false, true, (int)row![0]);
        if ((int)row[1] >= MaxKills)
        {
            (m.Reason, m.Why) = ("killed", $"{row[1]} processes ended while they handled it");
        }
    }

    private static async Task ReceiveAsync(NpgsqlConnection c, NpgsqlTransaction t, Message m)
    {
        var verdict = m.Reason is not null ? null : await c.AskAsync(
            "watership_inbox.receive($1, $2, $3, $4, $5, $6::jsonb)",
            Name, m.Id, m.Time, m.Key, m.Body, m.Properties);
        if (verdict?[0] is "handle")
        {
            // By the savepoint, nothing of the key passes before the message is parked. Its release
            // fails where the handler hid an error of a statement, and nothing can be committed.
            try
            {
                await t.SaveAsync("handler");
                await Consumer.HandleAsync(t, m);
                await t.ReleaseAsync("handler");
            }
            catch (Exception e) when (m.Failures + 1 >= MaxFailures && !Database.IsConflict(e))
            {
                await t.RollbackAsync("handler");
                (m.Reason, m.Why) = ("failed", e.Message);
            }
        }
        if (m.Reason is not null)
        {
            Console.Error.WriteLine($"parking {m.Id} of key {m.Key} ({m.Reason}): {m.Why}");
            await c.TellAsync("watership_inbox.park($1, $2, $3, $4, $5, $6, $7, $8::jsonb)",
                Name, m.Id, m.Time, m.Key, m.Reason, m.Why, m.Body, m.Properties);
        }
        else if (m.Recorded)
        {
            await c.TellAsync("watership_inbox.attempt_ended($1, $2)", Name, m.Id);
        }
    }

    // One try. False: another is needed. Throws where the connection is lost.
    internal static async Task<bool> AttemptAsync(NpgsqlConnection c, Message m)
    {
        try
        {
            if (m.Again && m.Reason is null)
            {
                await StartedAsync(c, m);
            }
            await using var t = await c.BeginTransactionAsync(); // rolled back unless it commits
            await ReceiveAsync(c, t, m);
            await t.CommitAsync();
            return true;
        }
        catch (Exception e) when (c.State == ConnectionState.Open)
        {
            if (Database.IsConflict(e) && ++m.Conflicts < MaxConflicts)
            {
                return false;
            }
            Console.Error.WriteLine($"failed: {m.Id} of key {m.Key}: {e.Message}");
            var row = await c.AskAsync(
                "watership_inbox.attempt_failed($1, $2, $3)", Name, m.Id, e.Message);
            (m.Recorded, m.Failures) = (true, (int)row![0]);
            if (m.Failures >= MaxFailures || e is PermanentException)
            {
                (m.Reason, m.Why) = ("failed", e.Message);
            }
            return false;
        }
    }

    // Milliseconds before the next try: 100, doubled up to 10 s, with full jitter.
    internal static int Backoff(Message m) =>
        Random.Shared.Next(Math.Min(10_000, 100 << Math.Min(m.Failures, 7)));

    // Lets the window of remembered messages move on.
    internal static async Task MaintainAsync(NpgsqlDataSource database)
    {
        await using var c = await database.OpenConnectionAsync();
        while ((await c.AskAsync("more FROM watership_inbox.maintain()"))![0] is true) { }
    }

    // Handles parked messages of keys that an operator marked for retry.
    internal static async Task RetryAsync(NpgsqlDataSource database, CancellationToken lost)
    {
        await using var c = await database.OpenConnectionAsync();
        await using var side = await database.OpenConnectionAsync();
        while (!lost.IsCancellationRequested && await RetryAsync(c, side)) { }
    }

    private static async Task<bool> RetryAsync(NpgsqlConnection c, NpgsqlConnection side)
    {
        object[]? row = null;
        try
        {
            await using var t = await c.BeginTransactionAsync();
            row = await c.AskAsync("""
                id, message_id, key, body, properties::text FROM watership_inbox.retry_next($1)
                """, Name);
            if (row is not null)
            {
                var m = new Message
                {
                    Id = (string)row[1],
                    Key = row[2] as string,
                    Body = (byte[])row[3],
                    Properties = (string)row[4],
                };
                await StartedAsync(side, m);
                if (m.Reason is not null)
                {
                    throw new InvalidOperationException(m.Why);
                }
                await Consumer.HandleAsync(t, m);
                await c.TellAsync("watership_inbox.retry_done($1)", row[0]);
            }
            await t.CommitAsync(); // also without a row: a key without messages is live again
            return row is not null;
        }
        catch (Exception e) when (c.State == ConnectionState.Open && row is not null)
        {
            if (!Database.IsConflict(e))
            {
                Console.Error.WriteLine($"retry failed: {row[1]}: {e.Message}");
                await side.TellAsync("watership_inbox.retry_failed($1, $2)", row[0], e.Message);
            }
            return false;
        }
    }
}
