-- From when on rows may lie behind the checkpoint of relay $1: when it was stored, and ten minutes
-- before, for transactions that had begun by then and committed later. In UTC, as text.
SELECT to_char((updated_at - interval '10 minutes') AT TIME ZONE 'UTC',
    'YYYY-MM-DD HH24:MI:SS.US"Z"')
FROM watership.checkpoint
WHERE name = $1
