"""The pure-Python broker of the demo: ``python -m deploy.demo.embedded_broker PORT``. MQTT 3.1.1, memory only."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import Any

from amqtt.broker import Broker

# amqtt queues messages for an absent session only when the client gave a name; any name will do here.
_CONFIG = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": False}}


class FaithfulBroker(Broker):  # type: ignore[misc]  # amqtt publishes no types
    """amqtt with two departures from MQTT 3.1.1 put right; a node rightly treats what it gets otherwise as stale."""

    async def _publish_session_retained_messages(self, session: Any) -> None:
        # Messages that waited for an absent session are not retained ones: their flag must be 0 (MQTT-3.3.1-9).
        client = self._get_handler(session)
        waiting = session.retained_messages
        tasks = []
        while client and not waiting.empty():
            message = await waiting.get()
            tasks.append(asyncio.ensure_future(client.mqtt_publish(message.topic, message.data, message.qos, False)))
        if tasks:
            await asyncio.wait(tasks)

    async def _publish_retained_messages_for_subscription(self, subscription: tuple[str, int], session: Any) -> None:
        # At a reconnection amqtt goes through the filters of all clients; only this client's are its business.
        if any(known is session for known, _ in self._subscriptions.get(subscription[0], ())):
            await super()._publish_retained_messages_for_subscription(subscription, session)


async def serve(port: int) -> None:
    """Run until SIGTERM or SIGINT.

    Args:
        port: on 127.0.0.1.
    """
    ended = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, ended.set)
    broker = FaithfulBroker(
        {"listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}}, "plugins": _CONFIG}
    )
    await broker.start()
    await ended.wait()
    await broker.shutdown()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    asyncio.run(serve(int(sys.argv[1])))
