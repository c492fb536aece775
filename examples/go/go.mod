// Write your own module's name, then: go mod tidy
module example.com/watership-examples

go 1.19

require (
	github.com/jackc/pgx/v4 v4.15.0
	github.com/rabbitmq/amqp091-go v1.5.0
)
