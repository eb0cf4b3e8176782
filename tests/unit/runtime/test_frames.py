"""Frames between the processes: whole, bounded, and never code."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from edge_agent.errors import EdgeError, IntegrityError, PermanentError, RefusedError, TransientError
from edge_agent.runtime.answer import Answer, GoldenMiss, GoldenOutcome, WorkerFacts, percentile
from edge_agent.runtime.frames import MAX_FRAME_BYTES, FrameChannel, FrameTimeout, error_from, error_message


@pytest.fixture
def ends() -> Iterator[tuple[FrameChannel, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = FrameChannel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


def test_message_arrives_whole_however_it_is_cut(ends: tuple[FrameChannel, socket.socket]) -> None:
    channel, raw = ends
    body = '{"text":"größer 漢"}'.encode()
    for byte in struct.pack(">I", len(body)) + body:
        raw.sendall(bytes([byte]))
    assert channel.receive(timeout_s=5) == {"text": "größer 漢"}


def test_large_message_crosses(ends: tuple[FrameChannel, socket.socket]) -> None:
    channel, raw = ends
    message = {"text": "\ud800 漢" * 200_000}  # lone surrogates can come out of JSON and must go back into it
    received: list[object] = []
    other = FrameChannel(raw)
    reader = threading.Thread(target=lambda: received.append(other.receive(timeout_s=20)))
    reader.start()
    channel.send(message, timeout_s=20)
    reader.join(20)
    assert received == [message]


def test_silence_is_a_timeout(ends: tuple[FrameChannel, socket.socket]) -> None:
    with pytest.raises(FrameTimeout):
        ends[0].receive(timeout_s=0.05)


def test_a_trickle_does_not_extend_the_timeout(ends: tuple[FrameChannel, socket.socket]) -> None:
    channel, raw = ends
    raw.sendall(b"\x00\x00")
    with pytest.raises(FrameTimeout):
        channel.receive(timeout_s=0.05)


def test_reader_that_does_not_read_is_a_timeout(ends: tuple[FrameChannel, socket.socket]) -> None:
    with pytest.raises(FrameTimeout):
        ends[0].send({"text": "x" * 4_000_000}, timeout_s=0.05)


def test_closed_end_is_none(ends: tuple[FrameChannel, socket.socket]) -> None:
    channel, raw = ends
    raw.close()
    assert channel.receive(timeout_s=5) is None


def test_writing_to_a_closed_end_is_an_error_of_ours(ends: tuple[FrameChannel, socket.socket]) -> None:
    channel, raw = ends
    raw.close()
    with pytest.raises(EdgeError):
        channel.send({"a": 1})


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xff\xff\xff",
        struct.pack(">I", MAX_FRAME_BYTES + 1),
        struct.pack(">I", 0),
        struct.pack(">I", 4) + b"\xff\xfe{}",
        struct.pack(">I", 2) + b"[]",
        struct.pack(">I", 20000) + b"[" * 20000,
    ],
    ids=["huge", "just-too-long", "empty", "not-utf8", "list", "nested"],
)
def test_garbage_is_refused(ends: tuple[FrameChannel, socket.socket], sent: bytes) -> None:
    channel, raw = ends
    raw.sendall(sent)
    with pytest.raises(PermanentError) as caught:
        channel.receive(timeout_s=5)
    assert caught.value.code == "worker.protocol"


@pytest.mark.parametrize("sent", [b"\x00\x00", struct.pack(">I", 10) + b"{"], ids=["length", "body"])
def test_torn_frame_is_refused(ends: tuple[FrameChannel, socket.socket], sent: bytes) -> None:
    channel, raw = ends
    raw.sendall(sent)
    raw.close()
    with pytest.raises(PermanentError) as caught:
        channel.receive(timeout_s=5)
    assert caught.value.code == "worker.protocol"


def test_oversize_message_is_refused_before_a_byte_is_sent(ends: tuple[FrameChannel, socket.socket]) -> None:
    channel, raw = ends
    with pytest.raises(RefusedError) as caught:
        channel.send({"text": "x" * MAX_FRAME_BYTES})
    assert caught.value.code == "event.too_large"
    channel.send({"a": 1})
    assert FrameChannel(raw).receive(timeout_s=5) == {"a": 1}


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, 10**5000], ids=["bytes", "set", "integer-of-5000-digits"])
def test_what_json_cannot_express_is_refused(ends: tuple[FrameChannel, socket.socket], value: object) -> None:
    with pytest.raises(RefusedError) as caught:
        ends[0].send({"event": {"text": value}})
    assert caught.value.code == "event.bad_field"


@pytest.mark.parametrize("cls", [TransientError, PermanentError, IntegrityError, RefusedError])
def test_errors_keep_kind_code_detail_and_context(cls: type[EdgeError]) -> None:
    sent = cls("area.fault", "why", path="model/x", size_bytes=3, odd=object())
    got = error_from(error_message(sent))
    assert type(got) is cls
    assert (got.code, got.detail, got.context) == ("area.fault", "why", {"path": "model/x", "size_bytes": 3})


def test_error_whose_context_shadows_a_name_still_arrives() -> None:
    got = error_from(
        {"kind": "nonsense", "code": "a.b", "detail": "d", "context": {"code": "x", "detail": "y", "n": 1}}
    )
    assert (type(got), got.code, got.context) == (PermanentError, "a.b", {"n": 1})


def test_what_crosses_comes_back_equal() -> None:
    import json

    answer = Answer(
        {"a": 1}, {"a": 0.5}, "rule", ("a",), ("g",), truncated=True, passes=2, tokens_out=9, latency_ms=1.5
    )
    facts = WorkerFacts(1.0, 2, ("P",), ("t",), {"t": 3}, 4, 2, ("w",))
    golden = GoldenOutcome(2, (GoldenMiss("t", 0, {"a": 1}, None, "worker.deadline"),), 3.5, 10)
    assert Answer.from_dict(json.loads(json.dumps(answer.as_dict()))) == answer
    assert WorkerFacts.from_dict(json.loads(json.dumps(facts.as_dict()))) == facts
    assert GoldenOutcome.from_dict(json.loads(json.dumps(golden.as_dict()))) == golden


def test_percentile_is_the_nearest_rank() -> None:
    assert percentile([], 0.95) == 0.0
    assert percentile([3.0], 0.95) == 3.0
    assert percentile([float(n) for n in range(100, 0, -1)], 0.95) == 95.0
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0
