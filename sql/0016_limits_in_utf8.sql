-- Watership 0016: limits count the bytes of the message.
--
-- A message is in UTF-8. The outbox counted bytes in the encoding of the database, so in one that
-- is not UTF8 it took events that no message can hold, and the relay parked them. It also took
-- names of headers with a line feed.

SET ROLE watership_owner;

-- As before, with all limits in bytes of UTF-8. Rows that are there are not checked again.
CREATE OR REPLACE FUNCTION watership.fits_a_message(
    aggregate_type text, aggregate_id text, event_type text,
    content_type text, headers jsonb, traceparent text, created_at timestamptz
) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    wrong text;
BEGIN
    IF aggregate_type = '' OR event_type = '' THEN
        wrong := 'aggregate_type and event_type must not be empty';
    -- An AMQP routing key is at most 255 bytes, and the default one is "type.event".
    ELSIF octet_length(convert_to(aggregate_type || event_type, 'UTF8')) > 254 THEN
        wrong := 'aggregate_type and event_type may have 254 bytes together';
    ELSIF octet_length(convert_to(aggregate_id, 'UTF8')) NOT BETWEEN 1 AND 1024 THEN
        wrong := 'aggregate_id must have 1 to 1024 bytes';
    ELSIF octet_length(convert_to(content_type, 'UTF8')) NOT BETWEEN 1 AND 255 THEN
        wrong := 'content_type must have 1 to 255 bytes';
    ELSIF octet_length(convert_to(traceparent, 'UTF8')) NOT BETWEEN 1 AND 255 THEN
        wrong := 'traceparent must have 1 to 255 bytes';
    -- It becomes an AMQP timestamp, and chooses the partition.
    ELSIF created_at NOT BETWEEN '1970-01-01 00:00:00+00' AND '9999-12-31 00:00:00+00' THEN
        wrong := 'created_at must lie between the years 1970 and 9999';
    ELSIF headers IS NOT NULL THEN
        IF jsonb_typeof(headers) <> 'object' THEN
            wrong := 'headers must be a JSON object';
        -- All headers must fit into one frame (60 KiB), beside up to 4 KiB of the relay's own and
        -- of AMQP properties. As AMQP fields in UTF-8 they are never more than three times as long
        -- as the text, so only long ones are counted: two bytes for the length of a name and the
        -- type, four for the length of a text; an integer of 64 bits has eight.
        ELSIF octet_length(headers::text) > 16384 AND 57344 < (
            SELECT sum(2 + octet_length(key) + CASE jsonb_typeof(value)
                WHEN 'null' THEN 0
                WHEN 'boolean' THEN 1
                WHEN 'number' THEN greatest(8, 4 + octet_length(value::text))
                ELSE 4 + octet_length(convert_to(value #>> '{}', 'UTF8')) END)
            FROM jsonb_each(headers))
        THEN
            wrong := 'headers may have 57344 bytes as AMQP fields';
        -- CC and BCC make RabbitMQ deliver to further queues, x-* are its own, ws-* the relay's.
        ELSIF jsonb_path_exists(headers, '$.keyvalue().key ? (@ like_regex "^(CC$|BCC$|x-|ws-)")')
        THEN
            wrong := 'headers must not have the reserved names CC, BCC, x-* and ws-*';
        -- A header's name is an AMQP short string. (A regex that counts to 255 is slow.) [^!-~]
        -- matches a line feed only with the flag. ASCII has as many bytes in every encoding.
        ELSIF jsonb_path_exists(headers, '$.keyvalue().key ? (@ like_regex "^$|[^!-~]" flag "s")')
            OR octet_length(headers::text) > 255 AND EXISTS (
                SELECT FROM jsonb_object_keys(headers) AS name WHERE octet_length(name) > 255)
        THEN
            wrong := 'names of headers must have 1 to 255 printable ASCII characters';
        END IF;
    END IF;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'watership.outbox: %', wrong USING ERRCODE = 'check_violation';
    END IF;
    RETURN true;
END
$$;

INSERT INTO watership.migration (version, name) VALUES (16, '0016_limits_in_utf8');

RESET ROLE;
