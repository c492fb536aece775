"""One mq-bridge route, as the environment says; runs until it is killed."""

import os

from mq_bridge import Route

Route.from_config(
    {
        "input": {
            "postgres_cdc": {
                "url": os.environ["PEER_DATABASE"],
                "publication": os.environ["PEER_PUBLICATION"],
                "slot_name": os.environ["PEER_SLOT"],
                "create_slot": False,
                "create_publication": False,
            }
        },
        "output": {
            "amqp": {
                "url": os.environ["PEER_BROKER"],
                "queue": os.environ["PEER_QUEUE"],
                "no_declare_queue": True,
            }
        },
        # The fastest of 512, 1024, 2048, 4096 and 8192.
        "batch_size": 4096,
    }
).run()
