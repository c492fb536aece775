// NOT COVERED BY TESTS: written against the documented API of RabbitMQ.Client 7 and Npgsql 8.
// A consumer: each message has its effect once, in order within its key, whatever crashes. This
// file is yours; take the others as they are.

using System.Runtime.InteropServices;
using Npgsql;
using RabbitMQ.Client;

public static class Consumer
{
    internal static readonly ConnectionFactory Broker = new()
    {
        Uri = new Uri(Environment.GetEnvironmentVariable("AMQP_URL")!),
        AutomaticRecoveryEnabled = false, // it would hide what was lost
        RequestedHeartbeat = TimeSpan.FromSeconds(5),
    };

    // RabbitMQ before 4.3 redelivers several messages of an ordered queue out of order.
    internal static readonly ushort Prefetch =
        (ushort)(Environment.GetEnvironmentVariable("ORDERED") == "true" ? 1 : 50);

    // What it does in this transaction has its effect once. When it throws, it is called again, and
    // in the end the message is parked with its key; at once if it throws PermanentException.
    // (This one is for the crash test.)
    public static async Task HandleAsync(NpgsqlTransaction transaction, Message message)
    {
        await using var insert = new NpgsqlCommand(
            """
            INSERT INTO watership_torture.effect (message_id, key, number)
            SELECT $1, e ->> 'key', (e ->> 'number')::bigint
            FROM CAST(convert_from($2, 'UTF8') AS json) AS e
            """, transaction.Connection, transaction);
        insert.Parameters.Add(new NpgsqlParameter { Value = message.Id });
        insert.Parameters.Add(new NpgsqlParameter { Value = message.Body });
        await insert.ExecuteNonQueryAsync();
    }

    public static async Task Main()
    {
        using var stop = new CancellationTokenSource();
        void Stop(PosixSignalContext signal)
        {
            signal.Cancel = true; // what has begun may end
            stop.Cancel();
        }
        using var term = PosixSignalRegistration.Create(PosixSignal.SIGTERM, Stop);
        using var interrupt = PosixSignalRegistration.Create(PosixSignal.SIGINT, Stop);
        for (var wait = 100; !stop.IsCancellationRequested; wait = Math.Min(2 * wait, 5000))
        {
            var began = Environment.TickCount64;
            var cause = await new Subscription(stop.Token).RunAsync();
            if (!stop.IsCancellationRequested)
            {
                Console.Error.WriteLine($"subscription lost: {cause}");
                wait = Environment.TickCount64 - began > 5000 ? 100 : wait;
                await Task.Delay(wait, stop.Token).ContinueWith(_ => { });
            }
        }
    }
}
