// A message, from the queue or parked.

import com.rabbitmq.client.Delivery;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.time.OffsetDateTime;
import java.time.ZoneOffset;
import java.util.*;
import java.util.stream.Collectors;

final class Message {
    final String id, key;
    final OffsetDateTime time;
    final byte[] body;
    final String properties; // JSON: exchange, routing_key, headers (with traceparent), …
    String reason, why = ""; // with a reason, it is parked and not handled (again)
    boolean again, recorded; // it was delivered before; the inbox knows of an attempt
    int failures, conflicts;

    Message(Delivery delivery) {
        var p = delivery.getProperties();
        Map<String, Object> headers = p.getHeaders() == null ? Map.of() : p.getHeaders();
        body = delivery.getBody();
        key = headers.get("ws-key") == null ? null : clean(headers.get("ws-key").toString());
        time = p.getTimestamp() == null ? null
            : p.getTimestamp().toInstant().atOffset(ZoneOffset.UTC);
        again = delivery.getEnvelope().isRedeliver()
            || headers.get("x-delivery-count") instanceof Number count && count.longValue() > 0;
        // The client reads what is not UTF-8 as U+FFFD: different ids would become one.
        var missing = p.getMessageId() == null || p.getMessageId().isEmpty()
            || p.getMessageId().contains("\0") || p.getMessageId().contains("\uFFFD");
        reason = missing ? "no_message_id" : null;
        id = missing ? "sha256-" + HexFormat.of().formatHex(sha256(body)) : p.getMessageId();
        var all = new LinkedHashMap<String, Object>();
        all.put("exchange", delivery.getEnvelope().getExchange());
        all.put("routing_key", delivery.getEnvelope().getRoutingKey());
        all.put("content_type", p.getContentType());
        all.put("type", p.getType());
        all.put("app_id", p.getAppId());
        all.put("headers", headers);
        properties = json(all);
    }

    Message(Object[] parked) {
        id = (String) parked[1];
        key = (String) parked[2];
        body = (byte[]) parked[3];
        properties = (String) parked[4];
        time = null; // not needed any more
    }

    // What is handled one after the other.
    String lane() {
        return key == null ? "m" + id : "k" + key;
    }

    // What Postgres cannot store becomes U+FFFD.
    private static String clean(String text) {
        return text.replace('\0', '\uFFFD');
    }

    private static byte[] sha256(byte[] bytes) {
        try {
            return MessageDigest.getInstance("SHA-256").digest(bytes);
        } catch (NoSuchAlgorithmException e) {
            throw new IllegalStateException(e); // every Java has it
        }
    }

    private static String json(Object value) {
        if (value instanceof Map<?, ?> map) {
            return map.entrySet().stream()
                .map(e -> json("" + e.getKey()) + ":" + json(e.getValue()))
                .collect(Collectors.joining(",", "{", "}"));
        } else if (value instanceof List<?> list) {
            return list.stream().map(Message::json).collect(Collectors.joining(",", "[", "]"));
        } else if (value == null || value instanceof Boolean
            || value instanceof Number number && Double.isFinite(number.doubleValue())) {
            return "" + value;
        }
        var text = value instanceof byte[] bytes ? Base64.getEncoder().encodeToString(bytes)
            : value instanceof Date date ? "" + date.toInstant() : "" + value;
        return clean(text).chars().mapToObj(c -> c == '"' || c == '\\' ? "\\" + (char) c
            : c < ' ' ? String.format("\\u%04x", c) : "" + (char) c)
            .collect(Collectors.joining("", "\"", "\""));
    }
}
