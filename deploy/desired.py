"""Desired state: telling one node, over a broker that need not be trusted, which release to run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ValidationError

from deploy.broker import BrokerSession
from edge_agent.contract.dsse import DESIRED_TYPE, open_envelope, sign_envelope
from edge_agent.contract.messages import DesiredState, Reported, Status
from edge_agent.contract.topics import NodeTopics
from edge_agent.errors import IntegrityError

VALIDITY = timedelta(days=30)
# Above this a reported revision is taken for a lie: adopting it would exhaust the numbers.
_REV_LIMIT = 1 << 40
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeView:
    """What a node says about itself; None where nothing is retained.

    Args:
        topics: the node.
        status: birth or death certificate.
        reported: where it is with its model.
    """

    topics: NodeTopics
    status: Status | None
    reported: Reported | None


def sign_desired(state: DesiredState, key: Ed25519PrivateKey) -> bytes:
    """The envelope that goes on ``model/desired``."""
    return sign_envelope(DESIRED_TYPE, state.model_dump_json().encode(), key)


def read_desired(envelope: bytes, trusted: Sequence[Ed25519PublicKey]) -> DesiredState:
    """Open an envelope.

    Raises:
        IntegrityError: ``signature.*``, or ``desired.invalid`` when what was signed is not a desired state.
    """
    payload = open_envelope(envelope, DESIRED_TYPE, trusted)
    try:
        return DesiredState.model_validate_json(payload)
    except ValidationError as error:
        raise IntegrityError("desired.invalid", f"signed payload is not a desired state: {error}") from error


def next_rev(session: BrokerSession, topics: NodeTopics, trusted: Sequence[Ed25519PublicKey]) -> int:
    """One more than the highest revision that this node has been sent or says to have seen.

    A retained envelope that does not verify is not counted: whoever can write to the broker could otherwise choose our
    numbers. What the node reports is counted, because a broker that lost its retained messages would restart at 1 and
    the node would refuse that as a replay.
    """
    found = session.retained(topics.model_desired, topics.model_reported)
    rev = 0
    if envelope := found.get(topics.model_desired):
        try:
            rev = read_desired(envelope, trusted).rev
        except IntegrityError as error:
            _log.warning("the retained desired state of %s is not ours and will be replaced: %s", topics.base, error)
    reported = parse_reported(found.get(topics.model_reported))
    if reported and reported.rev and reported.rev < _REV_LIMIT:
        rev = max(rev, reported.rev)
    return rev + 1


def send_desired(session: BrokerSession, topics: NodeTopics, state: DesiredState, key: Ed25519PrivateKey) -> None:
    """Sign a desired state and leave it retained for the node (raises as `BrokerSession.publish`)."""
    session.publish(topics.model_desired, sign_desired(state, key), retain=True)


def default_not_after() -> datetime:
    """How long a desired state stays acceptable when nobody says otherwise."""
    return (datetime.now(UTC) + VALIDITY).replace(microsecond=0)


def fleet(session: BrokerSession, *, site: str = "+", node: str = "+") -> list[NodeView]:
    """What the nodes of a site (or of all) have left retained, by site and node."""
    base = f"edge/v1/{site}/{node}"
    found = session.retained(f"{base}/status", f"{base}/model/reported")
    names = sorted({tuple(topic.split("/")[2:4]) for topic in found})
    views = []
    for levels in names:
        topics = NodeTopics(*levels)
        status = _parse_status(found.get(topics.status))
        views.append(NodeView(topics, status, parse_reported(found.get(topics.model_reported))))
    return views


def parse_reported(payload: bytes | None) -> Reported | None:
    """A ``model/reported`` payload; None for nothing or for what is not one."""
    try:
        return Reported.model_validate_json(payload) if payload else None
    except ValidationError:
        return None


def _parse_status(payload: bytes | None) -> Status | None:
    try:
        return Status.model_validate_json(payload) if payload else None
    except ValidationError:
        return None
