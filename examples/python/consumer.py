"""A consumer: one effect for each message, in the transaction that marks the message as handled.

    pip install './clients/python[async]' 'psycopg[binary]'
    AMQP_URL=... DATABASE_URL=... QUEUE=... CONSUMER=... python examples/python/consumer.py

Runs until SIGTERM. ORDERED=true for a queue with x-single-active-consumer; QUEUE may name several,
separated by commas: the partitions of a route, each of which has its own keys.
"""

import asyncio
import logging
import os
import signal
from typing import Any

import psycopg

from watership import Message
from watership.aio import Inbox


async def handle(message: Message, conn: psycopg.AsyncConnection[Any]) -> None:
    # Commit nothing in here: the helper does, together with the mark.
    await conn.execute(
        "INSERT INTO watership_torture.effect (message_id, key, number) VALUES (%s, %s, %s)",
        (message.id, message.json()["key"], message.json()["number"]))


async def main() -> None:
    queues = os.environ["QUEUE"].split(",")
    # Partitions run side by side, so each of them does with one connection to the database. To share
    # them among processes, subscribe to those of this process first: docs/consuming.md.
    inboxes = [Inbox(
        consumer=os.environ["CONSUMER"], queue=queue, amqp=os.environ["AMQP_URL"],
        database=os.environ["DATABASE_URL"], ordered=os.environ.get("ORDERED") == "true",
        concurrency=8 if len(queues) == 1 else 1, signals=False) for queue in queues]

    def stop() -> None:
        for inbox in inboxes:
            inbox.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    await asyncio.gather(*(inbox.run(handle) for inbox in inboxes))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(main())
