// A consumer: each message has its effect once, in order within its key, whatever crashes: see
// clients/README.md. It handles one message at a time; for more, start several, on the partitions of
// a route. The packages do in addition: keys side by side, dead letters (this one parks), counters,
// and a prefetch by the broker's version. Debian has pgx 4. For 5: "pgx/v5" and "pgx/v5/pgconn", and
// pgx.BeginFunc(always, db, …) for db.BeginFunc(always, …).
package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"math"
	"math/rand"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgconn"
	"github.com/jackc/pgx/v4"
	amqp "github.com/rabbitmq/amqp091-go"
)

var consumer, queue, always = os.Getenv("CONSUMER"), os.Getenv("QUEUE"), context.Background()
var stop, _ = signal.NotifyContext(always, syscall.SIGTERM, os.Interrupt)

type permanent struct{ error } // an error of the handler that another try would not change

type message struct {
	ID               string
	Key              *string
	Time             *time.Time
	Body, Properties []byte // JSON: exchange, routing_key, headers (with traceparent), …
	retried          *int64 // the number of one that was parked
	begins, hasID    bool   // begins: it came back, or has no id, and is not begun
}

// What it does in tx has its effect once. An error: it is called again, and in the end the message
// is parked with its key; at once if the error is permanent. (This one is for the crash test.)
func handle(ctx context.Context, tx pgx.Tx, m *message) error {
	_, err := tx.Exec(ctx, `INSERT INTO watership_torture.effect (message_id, key, number)
		SELECT $1, e ->> 'key', (e ->> 'number')::bigint
		FROM CAST(convert_from($2, 'UTF8') AS json) AS e`, m.ID, m.Body)
	return err
}

// What Postgres cannot store becomes U+FFFD.
func clean(text string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", "\uFFFD")
}

// A pair of backslashes is stepped over.
var noNULInJSON = strings.NewReplacer(`\\`, `\\`, `\u0000`, `\ufffd`)

func read(d amqp.Delivery) *message {
	m := &message{ID: d.MessageId, Body: append([]byte{}, d.Body...)} // an empty body is not NULL
	if key, isText := d.Headers["ws-key"].(string); isText {
		key = clean(key)
		m.Key = &key
	}
	m.hasID = m.ID != "" && utf8.ValidString(m.ID) && !strings.Contains(m.ID, "\x00")
	if !m.hasID {
		m.ID = fmt.Sprintf("sha256-%x", sha256.Sum256(d.Body))
	}
	count, _ := d.Headers["x-delivery-count"].(int64)
	m.begins = d.Redelivered || count > 0 || !m.hasID
	if !d.Timestamp.IsZero() {
		m.Time = &d.Timestamp
	}
	properties, err := json.Marshal(map[string]any{
		"exchange": d.Exchange, "routing_key": d.RoutingKey, "content_type": d.ContentType,
		"type": d.Type, "app_id": d.AppId, "headers": d.Headers})
	if err != nil { // a number that JSON does not have
		properties, _ = json.Marshal(map[string]any{"headers": fmt.Sprint(d.Headers)})
	}
	m.Properties = []byte(noNULInJSON.Replace(string(properties)))
	return m
}

// What is lost ends the subscription, in consume.
func check(err error) {
	if err != nil {
		panic(err)
	}
}

func must[T any](value T, err error) T {
	check(err)
	return value
}

// Calls a function of the inbox that says what is to be done next.
func (m *message) ask(db interface {
	QueryRow(context.Context, string, ...any) pgx.Row
}, next *string, function, more string, args ...any) error {
	args = append([]any{consumer, m.ID, m.Time, m.Key, m.Body, m.Properties, m.retried}, args...)
	return db.QueryRow(always, "SELECT next FROM watership_inbox."+function+
		"($1, $2, $3, $4, $5, $6, $7"+more+")", args...).Scan(next)
}

// One attempt, and what is to be done then.
func (m *message) attempt(db *pgx.Conn, tries int) (next string) {
	var err error
	if next = "handle"; m.begins {
		err = m.ask(db, &next, "begin_message", ", $8", m.hasID)
		m.begins = err != nil
	}
	if err == nil && next == "handle" {
		err = m.inTransaction(db, &next)
	}
	if err != nil {
		log.Printf("failed: %s: %v", m.ID, err)
		e := &pgconn.PgError{}
		errors.As(err, &e)
		check(m.ask(db, &next, "fail_message", ", $8, $9, state => $10, tries => $11",
			clean(err.Error()), errors.As(err, &permanent{}), e.Code, tries))
	}
	return next
}

func (m *message) inTransaction(db *pgx.Conn, next *string) error {
	return db.BeginFunc(always, func(tx pgx.Tx) error {
		if err := m.ask(tx, next, "receive_message", ""); err != nil || *next != "handle" {
			return err
		} // in a savepoint: its release fails if the handler hid an error
		err := tx.BeginFunc(always, func(tx pgx.Tx) error { return handle(always, tx, m) })
		if err == nil {
			_, err = tx.Exec(always, "SELECT watership_inbox.end_message($1, $2, $3)", consumer, m.ID,
				m.retried)
		}
		return err
	})
}

// Tries until it is handled or parked, or the program stops.
func (m *message) work(db *pgx.Conn) {
	for tries := 1; m.attempt(db, tries) == "again"; tries++ {
		pause(rand.Float64() * math.Min(0.1*math.Pow(2, float64(tries-1)), 10))
		check(stop.Err())
	}
}

func pause(seconds float64) {
	select {
	case <-stop.Done():
	case <-time.After(time.Duration(seconds * 1e9)):
	}
}

// Retries the next message that an operator marked. False if there is none.
func retry(db *pgx.Conn) bool {
	m := &message{begins: true, hasID: true}
	err := db.QueryRow(always, `SELECT retried, message_id, to_timestamp(seconds), key, body,
		properties FROM watership_inbox.next_retry($1)`, consumer).
		Scan(&m.retried, &m.ID, &m.Time, &m.Key, &m.Body, &m.Properties)
	if errors.Is(err, pgx.ErrNoRows) {
		return false
	}
	check(err)
	m.work(db)
	return true
}

func holds(db *pgx.Conn, expression string) (value bool) {
	check(db.QueryRow(always, "SELECT "+expression).Scan(&value))
	return value
}

// Lets the window of the inbox move on.
func maintain(db *pgx.Conn) {
	for holds(db, "(watership_inbox.maintain()).more") {
	}
}

// Handles messages, one after the other, until a connection is lost. Returns why.
func consume() (lost any) {
	defer func() { lost = recover() }()
	db := must(pgx.Connect(stop, os.Getenv("DATABASE_URL")))
	defer db.Close(always)
	if holds(db, "to_regproc('watership_inbox.suspect') IS NULL") { // of the newest file that is used
		panic("the inbox schema is older than this program: run watership inbox install")
	}
	maintain(db)
	broker := must(amqp.DialConfig(os.Getenv("AMQP_URL"), amqp.Config{Heartbeat: 5 * time.Second}))
	defer broker.Close() // without a cancel before it
	channel := must(broker.Channel())
	prefetch := 50
	if os.Getenv("ORDERED") == "true" { // RabbitMQ before 4.3 redelivers several out of order
		prefetch = 1
	}
	check(channel.Qos(prefetch, 0, false))
	deliveries := must(channel.Consume(queue, "", false, false, false, false, nil))
	second, heard := time.NewTicker(time.Second), time.Now()
	defer second.Stop()
	retries := time.NewTimer(0) // deliveries take turns with them
	for n := 0; stop.Err() == nil; {
		select {
		case <-stop.Done():
		case d, open := <-deliveries:
			if !open {
				panic("cancelled by the broker, or closed")
			}
			read(d).work(db)
			check(d.Ack(false))
			heard = time.Now()
		case <-retries.C:
			if retry(db) {
				retries.Reset(0)
			} else {
				retries.Reset(time.Second)
			}
		case <-second.C:
			if n++; n%3600 == 0 {
				maintain(db)
			}
			if n%15 == 0 { // does the broker know of us?
				q := must(channel.QueueInspect(queue))
				if q.Messages > 0 && (q.Consumers == 0 || time.Since(heard).Seconds() > 30) {
					panic("messages wait, and none comes")
				}
			}
		}
	}
	return nil
}

func main() {
	for failures := 0; stop.Err() == nil; failures++ {
		began := time.Now()
		log.Printf("subscription lost: %v", consume())
		if time.Since(began).Seconds() > 10 {
			failures = 0
		}
		pause(math.Min(0.1*math.Pow(2, float64(failures)), 5))
	}
}
