// What it does is written in clients/README.md. Left out: dead_letter (it parks), and counters (there
// are log lines). Debian has pgx 4. With the current major, 5: "pgx/v5" in the imports,
// pgxpool.NewWithConfig for ConnectConfig, pgx.BeginFunc(always, c, …) for c.BeginFunc(always, …).
package main

import (
	"context"
	"fmt"
	"hash/crc32"
	"log"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v4/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
)

const concurrency, stopTimeout = 8, 30 * time.Second

// Subscribes again and again, until stop is done.
func run(stop context.Context, databaseURL, amqpURL string, ordered bool) {
	for wait := 100 * time.Millisecond; stop.Err() == nil; wait = twice(wait, 5*time.Second) {
		began := time.Now()
		if err := consume(stop, databaseURL, amqpURL, ordered); stop.Err() == nil {
			log.Printf("subscription lost: %v", err)
			if time.Since(began) > 5*time.Second {
				wait = 100 * time.Millisecond
			}
			pause(stop, wait)
		}
	}
}

func twice(wait, most time.Duration) time.Duration {
	if 2*wait > most {
		return most
	}
	return 2 * wait
}

func pause(end context.Context, wait time.Duration) bool {
	select {
	case <-end.Done():
		return false
	case <-time.After(wait):
		return true
	}
}

// One subscription, with connections of its own. Returns why it was lost.
func consume(stop context.Context, databaseURL, amqpURL string, ordered bool) error {
	ctx, end := context.WithCancel(stop) // when it is done, nothing new begins
	defer end()
	config, err := pgxpool.ParseConfig(databaseURL)
	if err != nil {
		return err
	}
	config.MaxConns = concurrency + 2 // two for retries
	pool, err := pgxpool.ConnectConfig(ctx, config)
	if err != nil {
		return err
	}
	defer func() { go pool.Close() }() // when what has begun has ended
	if _, err = pool.Exec(ctx, "SELECT watership_inbox.register($1)", consumer); err != nil {
		return err
	}
	broker, err := amqp.DialConfig(amqpURL, amqp.Config{Heartbeat: 5 * time.Second})
	if err != nil {
		return err
	}
	defer broker.Close()
	deliveries, watch, err := subscribe(broker, ordered)
	if err != nil {
		return err
	}
	database := make(chan error, 1) // the first one is enough
	go func() { report(database, retries(ctx, pool)) }()
	var inHand int64
	var last [1024]chan struct{} // by hash of the key: closed when its last message is done
	heard, look := time.Now(), time.NewTicker(15*time.Second)
	defer look.Stop()
	for {
		select {
		case <-stop.Done():
			limit := time.Now().Add(stopTimeout)
			for atomic.LoadInt64(&inHand) > 0 && time.Now().Before(limit) {
				time.Sleep(10 * time.Millisecond)
			}
			return nil
		case err := <-database:
			return fmt.Errorf("database: %w", err)
		case <-look.C:
			q, err := watch.QueueDeclarePassive(queue, false, false, false, false, nil)
			idle := atomic.LoadInt64(&inHand) == 0 && time.Since(heard) > 30*time.Second
			if err != nil || q.Messages > 0 && (q.Consumers == 0 || idle) {
				return fmt.Errorf("watchdog: %+v, %v", q, err)
			}
		case d, open := <-deliveries:
			if !open && broker.IsClosed() {
				return fmt.Errorf("connection lost")
			} else if !open {
				return fmt.Errorf("cancelled by the broker, or channel closed")
			}
			m := read(d)
			place := &last[crc32.ChecksumIEEE([]byte(m.lane))%uint32(len(last))]
			before, done := *place, make(chan struct{})
			*place, heard = done, time.Now()
			atomic.AddInt64(&inHand, 1)
			go func() {
				if before != nil {
					<-before
				}
				report(database, deliver(ctx, pool, m, d))
				atomic.AddInt64(&inHand, -1)
				close(done)
			}()
		}
	}
}

func report(to chan<- error, err error) {
	if err != nil {
		select {
		case to <- err:
		default:
		}
	}
}

func subscribe(broker *amqp.Connection, ordered bool) (<-chan amqp.Delivery, *amqp.Channel, error) {
	prefetch := 50
	if ordered { // RabbitMQ before 4.3 redelivers several messages out of order
		prefetch = 1
	}
	channel, err := broker.Channel()
	if err != nil {
		return nil, nil, err
	}
	if err = channel.Qos(prefetch, 0, false); err != nil {
		return nil, nil, err
	}
	watch, err := broker.Channel()
	if err != nil {
		return nil, nil, err
	}
	deliveries, err := channel.Consume(queue, "", false, false, false, false, nil)
	return deliveries, watch, err
}
