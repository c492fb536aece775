// A message, from the queue or parked.
package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	amqp "github.com/rabbitmq/amqp091-go"
)

// An error of the handler that another try would not change.
type permanent struct{ error }

type message struct {
	ID, Key, lane       string // lane: what is handled one after the other
	Time                *time.Time
	Body, Properties    []byte // JSON: exchange, routing_key, headers (with traceparent), …
	reason, why         string // with a reason, it is parked and not handled (again)
	again, recorded     bool   // it was delivered before; the inbox knows of an attempt
	failures, conflicts int
}

// NUL, which Postgres cannot store, becomes U+FFFD. In JSON, a pair of backslashes is stepped over.
var noNUL = strings.NewReplacer("\x00", "\uFFFD")
var noNULInJSON = strings.NewReplacer(`\\`, `\\`, `\u0000`, `\ufffd`)

func read(d amqp.Delivery) *message {
	key, _ := d.Headers["ws-key"].(string)
	key = noNUL.Replace(strings.ToValidUTF8(key, "\uFFFD"))
	count, _ := d.Headers["x-delivery-count"].(int64)
	m := &message{ID: d.MessageId, Key: key, again: d.Redelivered || count > 0}
	m.Body = append([]byte{}, d.Body...) // an empty body is not NULL
	if m.ID == "" || !utf8.ValidString(m.ID) || strings.Contains(m.ID, "\x00") {
		m.ID, m.reason = fmt.Sprintf("sha256-%x", sha256.Sum256(d.Body)), "no_message_id"
	}
	if m.lane = "k" + key; key == "" {
		m.lane = "m" + m.ID
	}
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
