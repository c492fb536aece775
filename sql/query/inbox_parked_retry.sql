-- Marks keys of the consumer $1 for retry: the key $2, or that of the message $3, or all ($4); with
-- $5 also those whose first message came after the window.
SELECT watership_inbox.retry($1, $2, $3, $4, $5)
