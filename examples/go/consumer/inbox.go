// What the inbox in the database is asked about a message, and told.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"math/rand"
	"time"

	"github.com/jackc/pgx/v4"
	"github.com/jackc/pgx/v4/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
)

const maxFailures, maxKills, maxConflicts = 5, 10, 10

var always = context.Background() // what has begun may end

func isState(err error, states ...string) bool {
	var e interface{ SQLState() string }
	for _, state := range states {
		if errors.As(err, &e) && e.SQLState() == state {
			return true
		}
	}
	return false
}

func isConflict(err error) bool { // of two transactions: no fault of the handler
	return isState(err, "40001", "40P01")
}

// Tries until the message is handled or parked; then acknowledges it. An error: the database is lost.
func deliver(ctx context.Context, pool *pgxpool.Pool, m *message, d amqp.Delivery) error {
	for wait := 100 * time.Millisecond; ctx.Err() == nil; {
		c, err := pool.Acquire(ctx)
		if err != nil {
			return err
		}
		if m.again && m.reason == "" {
			_ = m.started(c)
		}
		err = c.BeginFunc(always, m.receive)
		lost, delay := c.Conn().IsClosed(), 20*time.Millisecond
		if m.conflicts++; err != nil && !lost && !(isConflict(err) && m.conflicts < maxConflicts) {
			m.failed(c, err)
			delay, wait = wait, twice(wait, 10*time.Second)
		}
		c.Release()
		if err == nil {
			if m.reason != "" {
				log.Printf("parked: %s of key %q (%s): %s", m.ID, m.Key, m.reason, m.why)
			}
			_ = d.Ack(false) // on a closed channel: it comes again, as a duplicate
			return nil
		} else if lost {
			return err
		}
		pause(ctx, time.Duration(rand.Int63n(int64(delay))))
	}
	return nil
}

// An attempt begins, at a message that came back: what ends the process each time is given up.
func (m *message) started(c *pgxpool.Conn) error {
	killed := 0
	err := c.QueryRow(always, "SELECT failed, killed FROM watership_inbox.attempt_started($1, $2)",
		consumer, m.ID).Scan(&m.failures, &killed)
	if m.again, m.recorded = false, true; killed >= maxKills {
		m.reason, err = "killed", fmt.Errorf("%d processes ended while they handled it", killed)
		m.why = err.Error()
	}
	return err
}

func (m *message) failed(c *pgxpool.Conn, err error) {
	log.Printf("failed: %s of key %q: %v", m.ID, m.Key, err)
	if isState(err, "WI003") { // nobody has called it for weeks
		maintain(c, m.Time)
		return
	}
	m.recorded = true
	_ = c.QueryRow(always, "SELECT watership_inbox.attempt_failed($1, $2, $3)", consumer, m.ID,
		err.Error()).Scan(&m.failures)
	if m.failures >= maxFailures || errors.As(err, &permanent{}) {
		m.reason, m.why = "failed", err.Error()
	}
}

// One try: receive, and handle or park.
func (m *message) receive(tx pgx.Tx) (err error) {
	verdict := ""
	if m.reason == "" {
		err = tx.QueryRow(always, `SELECT watership_inbox.receive(
			$1, $2, $3, nullif($4, ''), $5, $6)`, consumer, m.ID, m.Time, m.Key, m.Body,
			m.Properties).Scan(&verdict)
	}
	if verdict == "handle" { // in a savepoint: nothing of the key passes before it is parked
		err = tx.BeginFunc(always, func(tx pgx.Tx) error { return handle(always, tx, m) })
		if err != nil && !isConflict(err) && m.failures+1 >= maxFailures {
			m.reason, m.why, err = "failed", err.Error(), nil
		}
	}
	if err == nil && m.reason != "" {
		_, err = tx.Exec(always, `SELECT watership_inbox.park(
			$1, $2, $3, nullif($4, ''), $5, $6, $7, $8)`, consumer, m.ID, m.Time, m.Key, m.reason,
			m.why, m.Body, m.Properties)
	} else if err == nil && m.recorded {
		_, err = tx.Exec(always, "SELECT watership_inbox.attempt_ended($1, $2)", consumer, m.ID)
	}
	return err
}
