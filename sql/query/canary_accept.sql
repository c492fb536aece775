-- Canaries of relay $1 that were written until now may be missing.
UPDATE watership.canary SET accepted = number WHERE name = $1
