//! Speaks AMQP 0-9-1 to RabbitMQ; knows no event, no Postgres, no config.
