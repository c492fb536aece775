-- Gives up messages of the consumer $1 for the reason $2: those of the key $3, or the message $4.
SELECT watership_inbox.discard($1, $2, $3, $4)
