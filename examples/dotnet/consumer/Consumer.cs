// NOT COVERED BY TESTS: written against the documented API of RabbitMQ.Client 7 and Npgsql 8.
// A consumer: each message has its effect once, in order within its key, whatever crashes: see
// clients/README.md. It handles one message at a time; for more, start several, on the partitions of
// a route. The packages do in addition: keys side by side, dead letters (this one parks), counters,
// and a prefetch by the broker's version.

using System.Collections;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using System.Text;
using System.Text.Json;
using System.Threading.Channels;
using Npgsql;
using RabbitMQ.Client;
using RabbitMQ.Client.Events;

// An error of the handler that another try would not change.
public sealed class PermanentException(string message) : Exception(message);

// `Properties` is JSON: exchange, routing_key, headers (with traceparent), …; `Retried` numbers one
// that was parked; `Begins`: it came back, or has no id, and is not begun. `Time` is UTC.
public sealed record Message(string Id, DateTime? Time, string? Key, byte[] Body, string Properties,
    long? Retried, bool Begins, bool HasId)
{
    public bool Begins { get; set; } = Begins;

    internal static Message Read(BasicDeliverEventArgs d)
    {
        var p = d.BasicProperties;
        var headers = p.Headers ?? new Dictionary<string, object?>();
        var body = d.Body.ToArray(); // the client reuses its memory
        // The client reads what is not UTF-8 as U+FFFD: different ids would become one.
        var hasId = !string.IsNullOrEmpty(p.MessageId) && p.MessageId.IndexOfAny(['\0', '\uFFFD']) < 0;
        var again = d.Redelivered
            || headers.TryGetValue("x-delivery-count", out var n) && Convert.ToInt64(n) > 0;
        // A time that no DateTime holds is far from now in any case.
        var seconds = Math.Clamp(p.Timestamp.UnixTime, 0, 253402300799);
        return new Message(
            hasId ? p.MessageId! : "sha256-" + Convert.ToHexString(SHA256.HashData(body)).ToLower(),
            p.IsTimestampPresent() ? DateTimeOffset.FromUnixTimeSeconds(seconds).UtcDateTime : null,
            headers.TryGetValue("ws-key", out var key) ? Plain(key)?.ToString() : null, body,
            JsonSerializer.Serialize(Plain(new Dictionary<string, object?>
            {
                ["exchange"] = d.Exchange, ["routing_key"] = d.RoutingKey,
                ["content_type"] = p.ContentType, ["type"] = p.Type, ["app_id"] = p.AppId,
                ["headers"] = headers,
            })), null, again || !hasId, hasId);
    }

    // Values as JSON knows them. Headers come as bytes; NUL, which Postgres cannot store, goes.
    private static object? Plain(object? value) => value switch
    {
        string text => text.Replace('\0', '\uFFFD'),
        byte[] bytes => Plain(Encoding.UTF8.GetString(bytes)),
        BinaryTableValue binary => Convert.ToBase64String(binary.Bytes ?? []),
        AmqpTimestamp time => time.UnixTime,
        double d when !double.IsFinite(d) => d.ToString(),
        float f when !float.IsFinite(f) => f.ToString(),
        IDictionary<string, object?> table =>
            table.ToDictionary(e => e.Key.Replace('\0', '\uFFFD'), e => Plain(e.Value)),
        IList list => list.Cast<object?>().Select(Plain).ToList(),
        _ => value,
    };
}

public static class Consumer
{
    private static readonly string Name = Environment.GetEnvironmentVariable("CONSUMER")!;
    private static readonly string Queue = Environment.GetEnvironmentVariable("QUEUE")!;
    private static readonly CancellationTokenSource Stop = new();

    // What it does in this connection's transaction has its effect once. When it throws, it is
    // called again, and in the end the message is parked with its key; at once if it throws
    // PermanentException. (This one is for the crash test.)
    public static async Task HandleAsync(NpgsqlConnection db, Message message)
    {
        await AskAsync(db,
            """
            INSERT INTO watership_torture.effect (message_id, key, number)
            SELECT $1, e ->> 'key', (e ->> 'number')::bigint
            FROM CAST(convert_from($2, 'UTF8') AS json) AS e
            """, message.Id, message.Body);
    }

    // The first row of a statement, or null.
    private static async Task<object[]?> AskAsync(NpgsqlConnection db, string sql,
        params object?[] arguments)
    {
        await using var command = new NpgsqlCommand(sql, db); // in the connection's transaction
        foreach (var argument in arguments)
        {
            command.Parameters.Add(new NpgsqlParameter { Value = argument ?? DBNull.Value });
        }
        await using var reader = await command.ExecuteReaderAsync();
        var row = new object[reader.FieldCount];
        return await reader.ReadAsync() && reader.GetValues(row) >= 0 ? row : null;
    }

    // A function of the inbox that gets the whole message, and says what is to be done next.
    private static async Task<string> AskAsync(NpgsqlConnection db, Message m, string function,
        string more = "", params object?[] arguments) =>
        (string)(await AskAsync(db, $"SELECT next FROM watership_inbox.{function}($1, $2, "
            + $"$3::timestamptz, $4::text, $5, $6::jsonb, $7::bigint{more})",
            [Name, m.Id, m.Time, m.Key, m.Body, m.Properties, m.Retried, .. arguments]))![0];

    // One attempt, and what is to be done then. Throws where the connection is lost.
    private static async Task<string> AttemptAsync(NpgsqlConnection db, Message m, int tries)
    {
        try
        {
            if (m.Begins)
            {
                var begun = await AskAsync(db, m, "begin_message", ", $8", m.HasId);
                m.Begins = false;
                if (begun != "handle")
                {
                    return begun;
                }
            }
            await using var transaction = await db.BeginTransactionAsync();
            var next = await AskAsync(db, m, "receive_message");
            if (next == "handle")
            {
                await transaction.SaveAsync("watership_handler");
                await HandleAsync(db, m);
                await transaction.ReleaseAsync("watership_handler"); // fails if an error was hidden
                await AskAsync(db, "SELECT watership_inbox.end_message($1, $2, $3::bigint)", Name,
                    m.Id, m.Retried);
            }
            await transaction.CommitAsync();
            return next;
        }
        catch (Exception e) // it was rolled back
        {
            Console.Error.WriteLine($"failed: {m.Id} of key {m.Key}: {e.Message}");
            string? state = null;
            for (var cause = e; cause is not null; cause = cause.InnerException) // EF Core wraps it
            {
                state = (cause as PostgresException)?.SqlState ?? state;
            }
            return await AskAsync(db, m, "fail_message", ", $8, $9, state => $10::text, tries => $11",
                e.Message.Replace('\0', '\uFFFD'), e is PermanentException, state, tries);
        }
    }

    // Tries until it is handled or parked, or the program stops.
    private static async Task WorkAsync(NpgsqlConnection db, Message m)
    {
        for (var tries = 1; await AttemptAsync(db, m, tries) == "again"; tries++)
        {
            var limit = Math.Min(100 << Math.Min(tries - 1, 10), 10_000);
            await Task.Delay(Random.Shared.Next(limit), Stop.Token);
        }
    }

    // Retries the next message that an operator marked. False if there is none.
    private static async Task<bool> RetryAsync(NpgsqlConnection db)
    {
        var row = await AskAsync(db, "SELECT message_id, to_timestamp(seconds), key, body, "
            + "properties::text, retried FROM watership_inbox.next_retry($1)", Name);
        if (row is not null)
        {
            await WorkAsync(db, new Message((string)row[0], row[1] as DateTime?, row[2] as string,
                (byte[])row[3], (string)row[4], (long)row[5], true, true));
        }
        return row is not null;
    }

    // Lets the window of the inbox move on.
    private static async Task MaintainAsync(NpgsqlConnection db)
    {
        while ((bool)(await AskAsync(db, "SELECT (watership_inbox.maintain()).more"))![0])
        {
        }
    }

    // Handles messages, one after the other, until a connection is lost.
    private static async Task ConsumeAsync()
    {
        // Npgsql takes no URL: "Host=…;Username=…;Password=…;Database=…"
        await using var db = new NpgsqlConnection(Environment.GetEnvironmentVariable("DATABASE"));
        await db.OpenAsync(Stop.Token);
        // Of the newest file in sql/inbox that is used here.
        var isOld = await AskAsync(db, "SELECT to_regproc('watership_inbox.suspect') IS NULL");
        if ((bool)isOld![0])
        {
            throw new InvalidOperationException(
                "the inbox schema is older than this program: run watership inbox install");
        }
        await MaintainAsync(db);
        var factory = new ConnectionFactory
        {
            Uri = new Uri(Environment.GetEnvironmentVariable("AMQP_URL")!),
            AutomaticRecoveryEnabled = false, // it would hide what was lost
            RequestedHeartbeat = TimeSpan.FromSeconds(5),
        };
        await using var broker = await factory.CreateConnectionAsync(Stop.Token);
        var channel = await broker.CreateChannelAsync();
        // RabbitMQ before 4.3 redelivers several messages out of order.
        var isOrdered = Environment.GetEnvironmentVariable("ORDERED") == "true";
        await channel.BasicQosAsync(0, (ushort)(isOrdered ? 1 : 50), false);
        var deliveries = System.Threading.Channels.Channel.CreateUnbounded<(ulong, Message)>();
        var consumer = new AsyncEventingBasicConsumer(channel);
        consumer.ReceivedAsync += async (_, d) =>
            await deliveries.Writer.WriteAsync((d.DeliveryTag, Message.Read(d)));
        // Also fires when the channel or the connection is closed.
        consumer.UnregisteredAsync += (_, _) => Task.FromResult(
            deliveries.Writer.TryComplete(new IOException("cancelled by the broker, or closed")));
        await channel.BasicConsumeAsync(Queue, autoAck: false, consumer);
        var retrying = false;
        long second = 1, heard = Environment.TickCount64, next = heard;
        while (!Stop.IsCancellationRequested)
        {
            if (deliveries.Reader.TryRead(out var delivery))
            {
                await WorkAsync(db, delivery.Item2);
                await channel.BasicAckAsync(delivery.Item1, multiple: false);
                heard = Environment.TickCount64;
            }
            else if (deliveries.Reader.Completion.IsCompleted)
            {
                await deliveries.Reader.Completion; // throws
            }
            else if (!retrying)
            {
                await Task.WhenAny(deliveries.Reader.WaitToReadAsync().AsTask(), Task.Delay(100));
            }
            var isDue = Environment.TickCount64 >= next;
            retrying = (retrying || isDue) && await RetryAsync(db); // one, then a delivery again
            if (!isDue)
            {
                continue;
            }
            next = Environment.TickCount64 + 1000;
            if (second++ % 3600 == 0)
            {
                await MaintainAsync(db);
            }
            if (second % 15 == 0) // does the broker know of us?
            {
                var q = await channel.QueueDeclarePassiveAsync(Queue);
                if (q.MessageCount > 0
                    && (q.ConsumerCount == 0 || Environment.TickCount64 - heard > 30_000))
                {
                    throw new IOException("messages wait, and none comes");
                }
            }
        }
    }

    public static async Task Main()
    {
        void OnSignal(PosixSignalContext signal)
        {
            signal.Cancel = true; // what has begun may end
            Stop.Cancel();
        }
        using var term = PosixSignalRegistration.Create(PosixSignal.SIGTERM, OnSignal);
        using var interrupt = PosixSignalRegistration.Create(PosixSignal.SIGINT, OnSignal);
        for (var wait = 100; !Stop.IsCancellationRequested; wait = Math.Min(2 * wait, 5000))
        {
            var began = Environment.TickCount64;
            try
            {
                await ConsumeAsync();
            }
            catch (Exception e)
            {
                Console.Error.WriteLine($"subscription lost: {e.Message}");
            }
            wait = Environment.TickCount64 - began > 10_000 ? 100 : wait;
            await Task.Delay(wait, Stop.Token).ContinueWith(_ => { });
        }
    }
}
