"""The same consumer as consumer.py, without asyncio: psycopg and pika.

    pip install './clients/python[sync]' 'psycopg[binary]'
    AMQP_URL=... DATABASE_URL=... QUEUE=... CONSUMER=... python examples/python/consumer_sync.py
"""

import logging
import os
from typing import Any

import psycopg

from watership import Message
from watership.sync import Inbox


def handle(message: Message, conn: psycopg.Connection[Any]) -> None:
    # Runs in one of several threads. Commit nothing in here: the helper does.
    conn.execute(
        "INSERT INTO watership_torture.effect (message_id, key, number) VALUES (%s, %s, %s)",
        (message.id, message.json()["key"], message.json()["number"]))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    Inbox(
        consumer=os.environ["CONSUMER"], queue=os.environ["QUEUE"], amqp=os.environ["AMQP_URL"],
        database=os.environ["DATABASE_URL"], ordered=os.environ.get("ORDERED") == "true",
    ).run(handle)
