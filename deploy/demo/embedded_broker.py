"""The pure-Python broker of the demo: ``python -m deploy.demo.embedded_broker PORT``. MQTT 3.1.1, memory only.

amqtt departs from MQTT 3.1.1 in three places on which a store-and-forward node relies. They are put right here, in the
demo's process, and not worked around in the node: other brokers keep to the standard.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import Any

from amqtt.broker import Broker, RetainedApplicationMessage
from amqtt.mqtt.constants import QOS_0

# amqtt queues messages for an absent session only when the client gave a name; any name will do here.
_CONFIG = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": False}}


class AtLeastOnce:
    """Publishes to one session. What was not acknowledged when the connection ended waits for the next one.

    amqtt forgets such a message (MQTT-4.4.0-1 wants it sent again).
    """

    def __init__(self, broker: FaithfulBroker, session: Any) -> None:
        self._broker = broker
        self._session = session

    async def mqtt_publish(self, topic: str, data: bytes, qos: int, retain: bool) -> None:  # noqa: FBT001 - amqtt's
        """Take the place of the method of the same name of amqtt's connection."""
        session = self._session
        while (connection := self._broker.connection_of(session)) is not None:
            try:
                await connection.mqtt_publish(topic, data, qos, retain)
            except (asyncio.CancelledError, Exception) as error:
                task = asyncio.current_task()
                if qos == QOS_0 or session.clean_session or (task and task.cancelling()):
                    raise
                # Cancelled without us being cancelled: the connection was closed under the message.
                if isinstance(error, asyncio.CancelledError) or session.transitions.state != "connected":
                    await session.retained_messages.put(RetainedApplicationMessage(None, topic, data, qos))
                    return
                # Not acknowledged within amqtt's five seconds: a busy client, or a new connection meanwhile.
            else:
                return


class FaithfulBroker(Broker):  # type: ignore[misc]  # amqtt publishes no types
    """amqtt, keeping to MQTT 3.1.1 where the node relies on it."""

    def connection_of(self, session: Any) -> Any:
        """The present connection of a session, or None."""
        return super()._get_handler(session)

    def _get_handler(self, session: Any) -> AtLeastOnce | None:
        return AtLeastOnce(self, session) if self.connection_of(session) is not None else None

    async def _publish_session_retained_messages(self, session: Any) -> None:
        # Messages that waited for an absent session are not retained ones: their flag must be 0 (MQTT-3.3.1-9).
        client, waiting = AtLeastOnce(self, session), session.retained_messages
        tasks = []
        while not waiting.empty():
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
