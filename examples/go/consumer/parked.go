// Parked messages of keys that an operator marked for retry; and housekeeping.
package main

import (
	"context"
	"errors"
	"log"
	"time"

	"github.com/jackc/pgx/v4"
	"github.com/jackc/pgx/v4/pgxpool"
)

// Returns an error when the database is lost.
func retries(ctx context.Context, pool *pgxpool.Pool) error {
	c, err := pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer c.Release()
	side, err := pool.Acquire(ctx) // for what must be noted whatever becomes of the transaction
	if err != nil {
		return err
	}
	defer side.Release()
	for second := 0; ctx.Err() == nil; second++ {
		if second%3600 == 0 {
			maintain(side, nil)
		}
		for ctx.Err() == nil && retry(c, side) {
		}
		if c.Conn().IsClosed() || side.Conn().IsClosed() {
			return errors.New("the connection for retries was closed")
		}
		pause(ctx, time.Second)
	}
	return nil
}

// Lets the window of remembered messages move on; to a message that it could not take, if given.
func maintain(c *pgxpool.Conn, seen *time.Time) {
	for more := true; more; {
		err := c.QueryRow(always, "SELECT more FROM watership_inbox.maintain($1)", seen).Scan(&more)
		if err != nil {
			log.Printf("maintain: %v", err)
			return
		}
	}
}

// Handles the next one. False: there is none, or it failed.
func retry(c, side *pgxpool.Conn) (more bool) {
	id, m := int64(0), &message{}
	err := c.BeginFunc(always, func(tx pgx.Tx) error {
		err := tx.QueryRow(always, `
			SELECT id, message_id, occurred_at, coalesce(key, ''), body, properties
			FROM watership_inbox.retry_next($1)`, consumer).
			Scan(&id, &m.ID, &m.Time, &m.Key, &m.Body, &m.Properties)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil // the commit counts: a key without messages is live again
		}
		if err == nil {
			err = m.started(side)
		}
		if err == nil {
			err = handle(always, tx, m)
		}
		if err == nil {
			_, err = tx.Exec(always, "SELECT watership_inbox.retry_done($1)", id)
		}
		return err
	})
	if err != nil && id != 0 && !isConflict(err) && !c.Conn().IsClosed() {
		log.Printf("retry failed: %s of key %q: %v", m.ID, m.Key, err)
		_, _ = side.Exec(always, "SELECT watership_inbox.retry_failed($1, $2)", id, err.Error())
	}
	return err == nil && id != 0
}
