-- Up to which one canaries of relay $1 may be missing.
SELECT accepted FROM watership.canary WHERE name = $1
