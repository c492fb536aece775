// A producer: the event exists exactly when the transaction commits. With pgx 5: "pgx/v5", and
// pgx.BeginFunc(ctx, db, …) for db.BeginFunc(ctx, …). With GORM, the same within db.Transaction:
//
//	return tx.Exec("SELECT watership.emit('order', ?::bigint, 'paid', ?)", order, payload).Error
package main

import (
	"context"
	"encoding/json"
	"log"
	"os"

	"github.com/jackc/pgx/v4"
)

func pay(ctx context.Context, db *pgx.Conn, order int64) error {
	payload, err := json.Marshal(map[string]any{"id": order, "state": "paid"})
	if err != nil {
		return err
	}
	return db.BeginFunc(ctx, func(tx pgx.Tx) error {
		// The change comes first: by its row lock, events of an order come in the order of commits.
		_, err := tx.Exec(ctx, "UPDATE orders SET state = 'paid' WHERE id = $1", order)
		if err != nil {
			return err
		}
		// The cast says which emit is meant: aggregate_id may be bigint, uuid or text.
		_, err = tx.Exec(ctx, "SELECT watership.emit('order', $1::bigint, 'paid', $2)", order,
			string(payload))
		return err
	})
}

func main() {
	ctx := context.Background()
	db, err := pgx.Connect(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close(ctx)
	if err := pay(ctx, db, 7); err != nil {
		log.Fatal(err)
	}
}
