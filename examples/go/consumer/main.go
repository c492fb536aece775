// A consumer: each message has its effect once, in order within its key, whatever crashes. This
// file is yours; take the others as they are.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/jackc/pgx/v4" // or v5
)

var consumer, queue = os.Getenv("CONSUMER"), os.Getenv("QUEUE")

// What it does in tx has its effect once. An error: it is called again, and in the end the message is
// parked with its key; at once if the error is permanent. (This one is for the crash test.)
func handle(ctx context.Context, tx pgx.Tx, m *message) error {
	_, err := tx.Exec(ctx, `INSERT INTO watership_torture.effect (message_id, key, number)
		SELECT $1, e ->> 'key', (e ->> 'number')::bigint
		FROM CAST(convert_from($2, 'UTF8') AS json) AS e`, m.ID, m.Body)
	return err
}

func main() {
	stop, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	run(stop, os.Getenv("DATABASE_URL"), os.Getenv("AMQP_URL"), os.Getenv("ORDERED") == "true")
}
