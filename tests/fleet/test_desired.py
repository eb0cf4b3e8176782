from __future__ import annotations

import socket
from datetime import UTC, datetime, timedelta

import pytest

from deploy.broker import BrokerAddress, connect, parse_address
from deploy.desired import fleet, next_rev, read_desired, send_desired, sign_desired
from deploy.keys import Keys
from edge_agent.contract.dsse import generate_key, sign_envelope
from edge_agent.contract.messages import DesiredState, Reported, Status
from edge_agent.contract.topics import NodeTopics
from edge_agent.errors import EdgeError, IntegrityError, PermanentError, TransientError

NODE = NodeTopics("plant1", "press-gw")


def desired(rev: int) -> DesiredState:
    return DesiredState(
        node=NODE.node,
        rev=rev,
        release="triage/1.0.0/cpu-x86_64/manifest.json",
        digest="a" * 64,
        not_after=datetime.now(UTC) + timedelta(days=1),
    )


def reported(rev: int | None) -> bytes:
    return Reported(rev=rev, state="committed", timestamp_ms=1).model_dump_json().encode()


def test_changed_desired_state_does_not_verify(keys: Keys) -> None:
    envelope = sign_desired(desired(3), keys.private("desired"))
    assert read_desired(envelope, keys.trusted_desired()).rev == 3
    with pytest.raises(IntegrityError) as caught:
        read_desired(sign_desired(desired(3), generate_key()), keys.trusted_desired())
    assert caught.value.code == "signature.untrusted"


def test_signed_nonsense_is_named(keys: Keys) -> None:
    envelope = sign_envelope("application/vnd.edge-agent.desired.v1+json", b'{"rev":0}', keys.private("desired"))
    with pytest.raises(IntegrityError) as caught:
        read_desired(envelope, keys.trusted_desired())
    assert caught.value.code == "desired.invalid"


@pytest.mark.needs("mosquitto")
class TestOnABroker:
    def test_desired_state_stays_for_a_node_that_is_offline(self, mosquitto: BrokerAddress, keys: Keys) -> None:
        with connect(mosquitto) as session:
            send_desired(session, NODE, desired(7), keys.private("desired"))
        with connect(mosquitto) as session:
            found = session.retained(NODE.model_desired)
        assert read_desired(found[NODE.model_desired], keys.trusted_desired()).rev == 7

    def test_rev_starts_at_one_and_grows(self, mosquitto: BrokerAddress, keys: Keys) -> None:
        with connect(mosquitto) as session:
            for expected in (1, 2, 3):
                rev = next_rev(session, NODE, keys.trusted_desired())
                assert rev == expected
                send_desired(session, NODE, desired(rev), keys.private("desired"))

    def test_broker_that_lost_its_retained_messages_does_not_restart_the_count(
        self, mosquitto: BrokerAddress, keys: Keys
    ) -> None:
        with connect(mosquitto) as session:
            session.publish(NODE.model_reported, reported(41), retain=True)
            assert next_rev(session, NODE, keys.trusted_desired()) == 42

    def test_forged_revisions_do_not_exhaust_the_count(self, mosquitto: BrokerAddress, keys: Keys) -> None:
        with connect(mosquitto) as session:
            session.publish(NODE.model_desired, sign_desired(desired(10**9), generate_key()), retain=True)
            session.publish(NODE.model_reported, reported(10**15), retain=True)
            assert next_rev(session, NODE, keys.trusted_desired()) == 1

    def test_fleet_shows_silent_and_babbling_nodes_too(self, mosquitto: BrokerAddress) -> None:
        status = Status(state="online", boot_id="b", since_ms=1, version="0.1.0")
        with connect(mosquitto) as session:
            session.publish("edge/v1/plant1/a/status", status.model_dump_json().encode(), retain=True)
            session.publish("edge/v1/plant1/b/model/reported", reported(4), retain=True)
            session.publish("edge/v1/plant2/c/status", b"not json", retain=True)
            views = fleet(session)
        assert [(v.topics.site, v.topics.node) for v in views] == [("plant1", "a"), ("plant1", "b"), ("plant2", "c")]
        assert views[0].status == status
        assert views[0].reported is None
        assert views[1].reported
        assert views[1].reported.rev == 4
        assert views[2].status is None

    def test_publication_that_the_broker_forbids_is_an_error(self, mosquitto: BrokerAddress) -> None:
        with connect(mosquitto) as session, pytest.raises(PermanentError) as caught:
            session.publish("edge/v1/plant1/forbidden/status", b"{}", retain=True)
        assert caught.value.code == "broker.refused"


def code_of(address: BrokerAddress) -> str:
    with pytest.raises(EdgeError) as caught, connect(address):
        pass
    assert isinstance(caught.value, TransientError)
    return caught.value.code


def test_broker_that_is_down_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert code_of(BrokerAddress("127.0.0.1", unused.getsockname()[1])) == "net.refused"


def test_broker_that_never_answers_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert code_of(BrokerAddress("127.0.0.1", mute.getsockname()[1], timeout_s=0.3)) == "broker.timeout"


@pytest.mark.parametrize("text", ["", ":1883", "host:", "host:0", "host:65536", "host:x"])
def test_malformed_broker_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        parse_address(text)


def test_broker_address_forms() -> None:
    assert parse_address("broker") == ("broker", 1883)
    assert parse_address("broker:8883") == ("broker", 8883)
    assert parse_address("[::1]:1884") == ("::1", 1884)
