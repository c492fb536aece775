-- Watership 0014: a logical message shows that emit_wal wrote it.
--
-- Postgres lets every role write logical messages with any prefix. The relay ignores those without
-- the tag, so nobody who may not call emit_wal can emit an event, or fill watership.parked.

SET ROLE watership_owner;

-- The key of an HMAC-SHA256, padded with zeros to a block and combined with one byte.
CREATE FUNCTION watership.hmac_block(key bytea, with_byte integer) RETURNS bytea
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    block bytea := key || decode(repeat('00', 64 - length(key)), 'hex');
BEGIN
    FOR place IN 0..63 LOOP
        block := set_byte(block, place, get_byte(block, place) # with_byte);
    END LOOP;
    RETURN block;
END
$$;

-- The HMAC-SHA256 of "watership messages" under the secret of the database is the key of the tags.
CREATE FUNCTION watership.message_block(secret bytea, with_byte integer) RETURNS bytea
LANGUAGE sql IMMUTABLE STRICT
RETURN watership.hmac_block(sha256(watership.hmac_block(secret, 92)
    || sha256(watership.hmac_block(secret, 54) || 'watership messages'::bytea)), with_byte);

ALTER TABLE watership.secret
    ADD COLUMN messages_inner bytea
        GENERATED ALWAYS AS (watership.message_block(value, 54)) STORED,
    ADD COLUMN messages_outer bytea
        GENERATED ALWAYS AS (watership.message_block(value, 92)) STORED;

-- As before, and with a tag. It runs with the rights of the owner, who may read the secret. The
-- content, version 2:
--     1 byte   version, 2
--     32 bytes HMAC-SHA256 of all that follows
--     1 byte   'j' for JSON, 'b' for bytes
--     16 bytes id
--     8 bytes  created_at: microseconds since 2000-01-01 UTC
--     6 texts  aggregate_type, aggregate_id, event_type, content_type, traceparent, headers: four
--              bytes with the length (-1 for null), and then the bytes in UTF-8
--     the rest is the body
-- Numbers are big-endian.
CREATE OR REPLACE FUNCTION watership.append_message(
    id uuid, aggregate_type text, aggregate_id text, event_type text,
    payload json, data bytea, content_type text, headers jsonb
) RETURNS uuid
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    traceparent text;
    part text;
    content bytea;
    secret watership.secret;
BEGIN
    -- What the columns and the check of the outbox say.
    IF aggregate_type IS NULL OR aggregate_id IS NULL OR event_type IS NULL THEN
        RAISE EXCEPTION 'watership.emit_wal: aggregate_type, aggregate_id and event_type must not '
            'be null' USING ERRCODE = 'not_null_violation';
    ELSIF num_nonnulls(payload, data) <> 1 THEN
        RAISE EXCEPTION 'watership.emit_wal: exactly one of payload and data must be set'
            USING ERRCODE = 'check_violation';
    ELSIF current_setting('wal_level') <> 'logical' THEN
        RAISE EXCEPTION 'watership.emit_wal: wal_level is %, so nobody could read the event',
            current_setting('wal_level') USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    IF jsonb_typeof(headers) = 'object' THEN
        traceparent := headers ->> 'traceparent';
        headers := nullif(headers - 'traceparent', '{}');
    END IF;
    PERFORM watership.fits_a_message(
        aggregate_type, aggregate_id, event_type, content_type, headers, traceparent, now());
    id := coalesce(id, gen_random_uuid());
    content := CASE WHEN data IS NULL THEN '\x6a'::bytea ELSE '\x62'::bytea END
        || uuid_send(id) || timestamptz_send(now());
    FOREACH part IN ARRAY ARRAY[
        aggregate_type, aggregate_id, event_type, content_type, traceparent, headers::text]
    LOOP
        content := content || CASE WHEN part IS NULL THEN int4send(-1) ELSE
            int4send(octet_length(convert_to(part, 'UTF8'))) || convert_to(part, 'UTF8') END;
    END LOOP;
    content := content || coalesce(data, convert_to(payload::text, 'UTF8'));
    SELECT * INTO secret FROM watership.secret;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'watership.emit_wal: watership.secret is empty'
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    PERFORM pg_logical_emit_message(true, 'watership', '\x02'::bytea
        || sha256(secret.messages_outer || sha256(secret.messages_inner || content)) || content);
    RETURN id;
END
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA watership FROM PUBLIC;

INSERT INTO watership.migration (version, name) VALUES (14, '0014_signed_messages');

RESET ROLE;
