-- Whether the consumer $1 is known, and the names of all that are.
SELECT coalesce(bool_or(name = $1), false), coalesce(string_agg(name, ', ' ORDER BY name), '')
FROM watership_inbox.consumer
