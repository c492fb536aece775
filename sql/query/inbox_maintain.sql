-- Moves the window of the inbox on, by one day at most.
SELECT done, postponed, more FROM watership_inbox.maintain()
