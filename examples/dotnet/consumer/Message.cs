// Not covered by tests. A message, from the queue or parked.

using System.Collections;
using System.Security.Cryptography;
using System.Text;
using System.Text.Json;
using RabbitMQ.Client;
using RabbitMQ.Client.Events;

// An error of the handler that another try would not change.
public sealed class PermanentException(string message) : Exception(message);

public sealed class Message
{
    public required string Id { get; init; }
    public string? Key { get; init; }
    public DateTimeOffset? Time { get; init; }
    public required byte[] Body { get; init; }
    // JSON: exchange, routing_key, headers (with traceparent), …
    public required string Properties { get; init; }

    internal string? Reason { get; set; } // set: it is parked and not handled (again)
    internal string Why { get; set; } = "";
    internal bool Again { get; set; } // it was delivered before
    internal bool Recorded { get; set; } // the inbox knows of an attempt
    internal int Failures { get; set; }
    internal int Conflicts { get; set; }

    // What is handled one after the other.
    internal string Lane => Key is null ? "m" + Id : "k" + Key;

    internal static Message Read(BasicDeliverEventArgs d)
    {
        var p = d.BasicProperties;
        var headers = p.Headers ?? new Dictionary<string, object?>();
        var body = d.Body.ToArray(); // the client reuses its memory
        // The client reads what is not UTF-8 as U+FFFD: different ids would become one.
        var missing = string.IsNullOrEmpty(p.MessageId)
            || p.MessageId.Contains('\0') || p.MessageId.Contains('\uFFFD');
        // A time that no DateTimeOffset holds is far from now in any case.
        var seconds = Math.Clamp(p.Timestamp.UnixTime, 0, 253402300799);
        return new Message
        {
            Id = missing ? "sha256-" + Hex(SHA256.HashData(body)) : p.MessageId!,
            Key = headers.TryGetValue("ws-key", out var key) ? Plain(key)?.ToString() : null,
            Time = p.IsTimestampPresent() ? DateTimeOffset.FromUnixTimeSeconds(seconds) : null,
            Body = body,
            Properties = JsonSerializer.Serialize(new Dictionary<string, object?>
            {
                ["exchange"] = d.Exchange,
                ["routing_key"] = d.RoutingKey,
                ["content_type"] = Clean(p.ContentType ?? ""),
                ["type"] = Clean(p.Type ?? ""),
                ["app_id"] = Clean(p.AppId ?? ""),
                ["headers"] = Plain(headers),
            }),
            Reason = missing ? "no_message_id" : null,
            Again = d.Redelivered
                || headers.TryGetValue("x-delivery-count", out var n) && Convert.ToInt64(n) > 0,
        };
    }

    private static string Hex(byte[] bytes) => Convert.ToHexString(bytes).ToLowerInvariant();

    // What Postgres cannot store becomes U+FFFD.
    private static string Clean(string text) => text.Replace('\0', '\uFFFD');

    // Header values as JSON knows them. Strings come as bytes.
    private static object? Plain(object? value) => value switch
    {
        byte[] bytes => Clean(Encoding.UTF8.GetString(bytes)),
        BinaryTableValue binary => Convert.ToBase64String(binary.Bytes ?? []),
        AmqpTimestamp time => time.UnixTime,
        double d when !double.IsFinite(d) => d.ToString(),
        float f when !float.IsFinite(f) => f.ToString(),
        IDictionary<string, object?> table => table.ToDictionary(e => Clean(e.Key), e => Plain(e.Value)),
        IList list => list.Cast<object?>().Select(Plain).ToList(),
        _ => value,
    };
}
