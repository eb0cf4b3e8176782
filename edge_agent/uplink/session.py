"""The management connection of a node: connects, serves, reconnects, stops in order.

Two threads besides paho's. *uplink* connects, sends and reconnects; *intake* takes incoming messages to the ports. No
thread here runs inference, and nothing here is lost when one of them ends: the spool has it.

On every connection, in this order: CONNECT with the stored session and a fresh will, subscriptions (when the broker
kept none, or on the first connection of this process, since the configured sources may have changed), birth, what
``on_connected`` returns, then the outbox. So nothing is published before its answers can be heard.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time

from tenacity import RetryError, Retrying, retry_if_exception_type, stop_when_event_set, wait_random_exponential
from tenacity.nap import sleep_using_event

from edge_agent.contract.topics import NodeTopics
from edge_agent.errors import EdgeError, TransientError
from edge_agent.log import get_logger
from edge_agent.settings import MqttSettings
from edge_agent.uplink.cloudevents import JSON, WireMessage
from edge_agent.uplink.connection import Connack, Connection, Identity, Will
from edge_agent.uplink.drain import Drain
from edge_agent.uplink.intake import POLL_S, Intake
from edge_agent.uplink.ports import UplinkPorts
from edge_agent.uplink.spool import Spool

BACKOFF_FIRST_S = 0.5
# A connection that lived this long proves the broker well; the next loss starts with the shortest backoff again.
STABLE_S = 10.0
# Spreads the reconnects of a whole fleet after a broker's restart.
FIRST_JITTER_S = 0.5
# Answers to a MQTT 5 CONNECT of a broker that may only know 3.1.1. Some read the longer CONNECT wrongly, wait for more
# bytes and never answer: hence the short wait for a first answer.
MAYBE_OLD = frozenset({"mqtt.protocol_refused", "mqtt.closed_early", "mqtt.malformed_packet", "mqtt.no_connack"})
PROBE_S = 2.0
# After a fallback MQTT 5 is tried again this much later: the broker may have been replaced.
RETRY_V5_S = 600.0
_log = get_logger(__name__)


def client_id(topics: NodeTopics) -> str:
    """The stable MQTT client id of a node; the digest keeps ``a-b``/``c`` apart from ``a``/``b-c``."""
    digest = hashlib.sha256(topics.base.encode()).hexdigest()[:6]
    return f"edge-{topics.site}-{topics.node}-{digest}"


class MqttUplink:
    """Broker on one side, spool and ports on the other.

    Args:
        settings: the broker.
        topics: this node's topics; site and node give the client id.
        spool: events go in, decisions come out.
        ports: the agent.
        drain_per_s: bound of the sending rate, ``SpoolSettings.drain_per_s``.
        takes_answers: whether to subscribe to answers of escalations.
    """

    def __init__(
        self,
        settings: MqttSettings,
        topics: NodeTopics,
        spool: Spool,
        ports: UplinkPorts,
        *,
        drain_per_s: float = 500.0,
        takes_answers: bool = False,
    ) -> None:
        self._settings = settings
        self._topics = topics
        self._spool = spool
        self._ports = ports
        self._identity = Identity(client_id(topics))
        sources = {source.topic: source.task for source in settings.sources}
        self._filters = [
            (topics.events_filter, False),
            *((name, False) for name in sources),
            (topics.model_desired, True),
            # Only where the site wants it: a broker whose rules do not know the topic would refuse the subscription.
            *([(topics.escalation_answers_filter, False)] if takes_answers else []),
        ]
        self._drain = Drain(spool, drain_per_s, settings.max_inflight)
        self._intake = Intake(spool, ports, topics, sources, settings.max_packet_bytes)
        self._wake = spool.outbox_changed
        self._stopping = threading.Event()
        self._stop_deadline = float("inf")
        self._connection: Connection | None = None
        self._subscribed_once = False
        self._knows_v5 = False
        self._v5_not_before = 0.0
        self._last_fault: str | None = None
        self._intake_thread = threading.Thread(target=self._run_intake, name="intake", daemon=True)
        self._threads = [threading.Thread(target=self._run, name="uplink", daemon=True), self._intake_thread]

    # ---- for the agent, from any thread

    def start(self) -> None:
        """Begin to connect; returns at once. An absent broker is not an error: everything is spooled meanwhile."""
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Publish ``draining``, send what waits for at most ``timeout_s``, publish ``offline``, disconnect."""
        self._stop_deadline = time.monotonic() + timeout_s
        self._stopping.set()
        self._wake.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout_s + 5.0)

    @property
    def connected(self) -> bool:
        """Whether a session is up now."""
        connection = self._connection
        return connection is not None and connection.is_alive

    @property
    def fault(self) -> str | None:
        """Code of the fault that keeps us from the broker; None while connected."""
        return None if self.connected else self._last_fault

    def publish_retained(self, topic: str, payload: bytes) -> None:
        """Set retained state (QoS 1): sent as soon as there is a connection, the latest value per topic only."""
        self._drain.offer(topic, payload)

    def publish_telemetry(self, topic: str, payload: bytes, *, expiry_s: int = 90) -> bool:
        """Send a metric now (QoS 0, expires in the broker after ``expiry_s``) or never.

        Returns:
            False when there is no connection; metrics are not stored.
        """
        connection = self._connection
        if connection is None or not connection.is_alive:
            return False
        try:
            connection.publish(WireMessage(topic, payload, JSON, ()), qos=0, retain=False, expiry_s=expiry_s)
        except EdgeError:
            return False
        return True

    # ---- the uplink thread

    def _run(self) -> None:
        while not self._stopping.is_set():
            retrying = Retrying(
                retry=retry_if_exception_type(TransientError),
                wait=wait_random_exponential(multiplier=BACKOFF_FIRST_S, max=self._settings.reconnect_max_s),
                sleep=sleep_using_event(self._stopping),
                stop=stop_when_event_set(self._stopping),
            )
            try:
                retrying(self._live_once)
            except RetryError:
                return
            except Exception as error:  # noqa: BLE001 - a defect said once a minute beats a dead thread
                fault = error if isinstance(error, EdgeError) else TransientError("mqtt.failed", repr(error))
                _log.exception("uplink_failed", code=fault.code)
                self._stopping.wait(self._settings.reconnect_max_s)
            self._stopping.wait(random.uniform(0, FIRST_JITTER_S))  # noqa: S311 - jitter

    def _live_once(self) -> None:
        """One connection from CONNECT to its end; raises TransientError unless it was a stable one."""
        try:
            connection, connack = self._connect()
        except EdgeError as error:
            self._note_fault(error)
            raise
        began = time.monotonic()
        try:
            self._greet(connection, connack)
            self._serve(connection)
            if self._stopping.is_set():
                self._leave(connection)
                return
            fault = connection.fault
        except TransientError as error:
            fault = error
        finally:
            self._connection = None
            connection.kill()
        self._note_fault(fault)
        if time.monotonic() - began < STABLE_S:
            raise fault

    def _connect(self) -> tuple[Connection, Connack]:
        wants = self._settings.protocol
        if wants == "3.1.1" or (wants == "auto" and time.monotonic() < self._v5_not_before):
            self._v5_not_before = 0.0
            opened = self._open(is_v5=False)
        else:
            try:
                opened = self._open(is_v5=True)
            except TransientError as error:
                # A broker that has spoken MQTT 5 before is merely restarting: no reason to lose the features.
                is_old = error.code == "mqtt.protocol_refused" or (error.code in MAYBE_OLD and not self._knows_v5)
                if wants == "5" or not is_old or self._stopping.is_set():
                    raise
                _log.info("mqtt_fallback", to="3.1.1", because=error.code)
                opened = self._open(is_v5=False)
        if opened[1].is_v5:
            self._knows_v5 = True
        else:
            self._v5_not_before = time.monotonic() + RETRY_V5_S
        return opened

    def _open(self, *, is_v5: bool) -> tuple[Connection, Connack]:
        will = Will(self._topics.status, self._ports.status("offline"))
        connection = Connection(self._settings, self._identity, will, is_v5=is_v5, wake=self._wake)
        is_probe = is_v5 and not self._knows_v5 and self._settings.protocol == "auto"
        return connection, connection.open(min(PROBE_S, self._settings.connect_timeout_s) if is_probe else None)

    def _greet(self, connection: Connection, connack: Connack) -> None:
        self._drain.begin(connack)
        if not connack.session_present or not self._subscribed_once:
            connection.subscribe(self._filters)
            self._subscribed_once = True
        self._drain.offer(self._topics.status, self._ports.status("online"))
        for topic, payload in self._ports.on_connected():
            self._drain.offer(topic, payload)
        # From here on the intake takes messages; those that came before wait in the connection.
        self._connection = connection
        _log.info(
            "mqtt_connected",
            broker=f"{self._settings.host}:{self._settings.port}",
            protocol="5" if connack.is_v5 else "3.1.1",
            session_present=connack.session_present,
        )
        self._last_fault = None

    def _serve(self, connection: Connection) -> None:
        while connection.is_alive and not self._stopping.is_set():
            self._wake.clear()
            wait_s = self._drain.step(connection)
            if wait_s > 0:
                self._wake.wait(wait_s)

    def _leave(self, connection: Connection) -> None:
        # What the intake has just made durable is acknowledged before the connection goes.
        self._intake_thread.join(1.0)
        self._drain.offer(self._topics.status, self._ports.status("draining"))
        self._flush(connection, self._stop_deadline)
        self._drain.offer(self._topics.status, self._ports.status("offline"))
        self._flush(connection, max(self._stop_deadline, time.monotonic() + 1.0))
        connection.close()
        _log.info("mqtt_stopped")

    def _flush(self, connection: Connection, deadline: float) -> None:
        while connection.is_alive and time.monotonic() < deadline and not self._drain.is_idle:
            self._wake.clear()
            self._wake.wait(min(self._drain.step(connection), 0.05))

    def _note_fault(self, error: EdgeError) -> None:
        """Log a fault when it changes, not at every attempt."""
        if error.code != self._last_fault:
            _log.warning("mqtt_disconnected", error=error)
            self._last_fault = error.code

    # ---- the intake thread

    def _run_intake(self) -> None:
        seen: Connection | None = None
        while not self._stopping.is_set():
            connection = self._connection
            if connection is None:
                self._stopping.wait(POLL_S)
                continue
            if connection is not seen:
                self._intake.begin()
                seen = connection
            try:
                self._intake.step(connection, self._stopping)
            except Exception:  # noqa: BLE001 - as above
                _log.exception("intake_failed")
                self._stopping.wait(POLL_S)
