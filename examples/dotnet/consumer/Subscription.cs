// Not covered by tests. What it does is written in clients/README.md. Left out: dead_letter (it
// parks), the answer to WI003 (maintain runs every hour), counters (there are log lines).

using System.Collections.Concurrent;
using Npgsql;
using RabbitMQ.Client;
using RabbitMQ.Client.Events;

// One subscription, with connections of its own. When it is lost, nothing new begins.
internal sealed class Subscription(CancellationToken stop)
{
    internal const int Concurrency = 8;
    private static readonly string Queue = Environment.GetEnvironmentVariable("QUEUE")!;

    private readonly CancellationTokenSource lost =
        CancellationTokenSource.CreateLinkedTokenSource(stop);
    private readonly NpgsqlDataSource database = Database.Create();
    private readonly SemaphoreSlim slots = new(Concurrency);
    private readonly ConcurrentDictionary<string, Task> lanes = new();
    private string? cause;
    private int inHand;
    private long heard = Environment.TickCount64;

    private bool Idle => Volatile.Read(ref inHand) == 0
        && Environment.TickCount64 - Interlocked.Read(ref heard) > 30_000;

    private void Lose(string what)
    {
        Interlocked.CompareExchange(ref cause, what, null);
        lost.Cancel();
    }

    internal async Task<string?> RunAsync()
    {
        try
        {
            await using (var c = await database.OpenConnectionAsync())
            {
                await c.TellAsync("watership_inbox.register($1)", Inbox.Name);
            }
            await using var broker = await Consumer.Broker.CreateConnectionAsync(stop);
            await SubscribeAsync(await broker.CreateChannelAsync());
            var watch = await broker.CreateChannelAsync();
            var background = new List<Task>
            {
                EveryAsync(1, "database", () => Inbox.RetryAsync(database, lost.Token)),
                EveryAsync(3600, "database", () => Inbox.MaintainAsync(database)),
                EveryAsync(15, "watchdog", async () =>
                {
                    var q = await watch.QueueDeclarePassiveAsync(Queue);
                    if (q.MessageCount > 0 && (q.ConsumerCount == 0 || Idle))
                    {
                        Lose("watchdog: messages wait, and none comes");
                    }
                }),
            };
            await Task.Delay(Timeout.Infinite, lost.Token).ContinueWith(_ => { });
            if (stop.IsCancellationRequested)
            {
                background.AddRange(lanes.Values); // what has begun may end, and be acknowledged
            }
            await Task.WhenAny(Task.WhenAll(background), Task.Delay(30_000));
        }
        catch (Exception e)
        {
            Lose(e.Message);
        }
        await database.DisposeAsync(); // connections in use are closed when they come back
        return cause;
    }

    private async Task SubscribeAsync(IChannel channel)
    {
        await channel.BasicQosAsync(0, Consumer.Prefetch, false);
        var consumer = new AsyncEventingBasicConsumer(channel);
        // The client calls this for one message after the other; it must not wait.
        consumer.ReceivedAsync += (_, delivery) =>
        {
            Interlocked.Exchange(ref heard, Environment.TickCount64);
            Interlocked.Increment(ref inHand);
            var m = Message.Read(delivery);
            var before = lanes.GetValueOrDefault(m.Lane, Task.CompletedTask);
            var task = Task.Run(() => DeliverAsync(before, m, channel, delivery.DeliveryTag));
            lanes[m.Lane] = task;
            task.ContinueWith(_ =>
            {
                lanes.TryRemove(new KeyValuePair<string, Task>(m.Lane, task));
                Interlocked.Decrement(ref inHand);
            });
            return Task.CompletedTask;
        };
        // Also fires when the channel or the connection is closed.
        consumer.UnregisteredAsync += (_, _) =>
        {
            Lose(channel.IsOpen ? "cancelled by the broker" : "channel or connection closed");
            return Task.CompletedTask;
        };
        await channel.BasicConsumeAsync(Queue, autoAck: false, consumer);
    }

    // Tries until the message is handled or parked, or the subscription is lost.
    private async Task DeliverAsync(Task before, Message m, IChannel channel, ulong tag)
    {
        await before;
        try
        {
            while (true)
            {
                bool done;
                await slots.WaitAsync(lost.Token);
                try
                {
                    await using var c = await database.OpenConnectionAsync();
                    done = await Inbox.AttemptAsync(c, m);
                }
                finally
                {
                    slots.Release();
                }
                if (done)
                {
                    await channel.BasicAckAsync(tag, multiple: false);
                    return;
                }
                await Task.Delay(Inbox.Backoff(m), lost.Token);
            }
        }
        catch (Exception e)
        {
            Lose($"database: {e.Message}");
        }
    }

    private async Task EveryAsync(int seconds, string what, Func<Task> work)
    {
        try
        {
            while (true)
            {
                await work();
                await Task.Delay(TimeSpan.FromSeconds(seconds), lost.Token);
            }
        }
        catch (Exception e)
        {
            Lose($"{what}: {e.Message}");
        }
    }
}
