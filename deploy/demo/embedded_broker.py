"""The pure-Python broker of the demo: ``python -m deploy.demo.embedded_broker PORT``. MQTT 3.1.1, memory only."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

# amqtt queues messages for an absent session only when the client gave a name; any name will do here.
_CONFIG = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": False}}


async def serve(port: int) -> None:
    """Run until SIGTERM or SIGINT.

    Args:
        port: on 127.0.0.1.
    """
    from amqtt.broker import Broker

    ended = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, ended.set)
    broker = Broker({"listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}}, "plugins": _CONFIG})
    await broker.start()
    await ended.wait()
    await broker.shutdown()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    asyncio.run(serve(int(sys.argv[1])))
