"""A consumer: one effect for each message, in the transaction that marks the message as handled.

    pip install './clients/python[async]' 'psycopg[binary]'
    AMQP_URL=... DATABASE_URL=... QUEUE=... CONSUMER=... python examples/python/consumer.py

Runs until SIGTERM. ORDERED=true for a queue with x-single-active-consumer.
"""

import asyncio
import logging
import os
from typing import Any

import psycopg

from watership import Message
from watership.aio import Inbox


async def handle(message: Message, conn: psycopg.AsyncConnection[Any]) -> None:
    # Commit nothing in here: the helper does, together with the mark.
    await conn.execute(
        "INSERT INTO watership_torture.effect (message_id, key, number) VALUES (%s, %s, %s)",
        (message.id, message.json()["key"], message.json()["number"]))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(Inbox(
        consumer=os.environ["CONSUMER"], queue=os.environ["QUEUE"], amqp=os.environ["AMQP_URL"],
        database=os.environ["DATABASE_URL"], ordered=os.environ.get("ORDERED") == "true",
    ).run(handle))
