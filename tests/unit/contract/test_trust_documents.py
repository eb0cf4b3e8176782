"""Manifests, envelopes and topics in hostile hands."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from edge_agent.contract.dsse import (
    DESIRED_TYPE,
    MANIFEST_TYPE,
    generate_key,
    load_private_key,
    load_public_key,
    open_envelope,
    private_key_to_pem,
    public_key_to_pem,
    sign_envelope,
)
from edge_agent.contract.manifest import parse_manifest, read_manifest, verify_files
from edge_agent.contract.topics import NodeTopics, decision_topic
from edge_agent.errors import EdgeError, IntegrityError, PermanentError
from tests.fakes.bundles import bundle_of_task


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return bundle_of_task(tmp_path / "bundle")[0]


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "a/../../b", "", "a\\b", "./a", "a//b"])
def test_a_manifest_cannot_name_a_file_outside_the_bundle(bundle: Path, path: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    manifest["files"][0]["path"] = path
    with pytest.raises(IntegrityError, match="manifest_invalid"):
        parse_manifest(json.dumps(manifest).encode())


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "bundle.manifest_invalid"),
        (b"[]", "bundle.manifest_invalid"),
        (b"[" * 50_000, "bundle.manifest_invalid"),
        (b'{"format": 2}', "bundle.format_unsupported"),
        (b" " * (1 << 21), "bundle.manifest_invalid"),
    ],
)
def test_bytes_that_are_no_manifest_are_refused_with_their_code(raw: bytes, code: str) -> None:
    with pytest.raises(EdgeError) as caught:
        parse_manifest(raw)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("harm", "code"),
    [
        (lambda path: path.unlink(), "bundle.file_missing"),
        (lambda path: path.write_bytes(b""), "bundle.file_truncated"),
        (lambda path: path.write_bytes(b"[]"), "bundle.file_corrupt"),
    ],
    ids=["missing", "truncated", "corrupt"],
)
def test_each_kind_of_damage_has_its_own_code(bundle: Path, harm: Any, code: str) -> None:
    manifest, _ = read_manifest(bundle)
    harm(bundle / "tokenizer.json")
    with pytest.raises(IntegrityError) as caught:
        verify_files(bundle, manifest)
    assert caught.value.code == code


def test_an_envelope_opens_for_the_right_key_and_type_only() -> None:
    key, other = generate_key(), generate_key()
    envelope = sign_envelope(DESIRED_TYPE, b"payload", key)
    assert open_envelope(envelope, DESIRED_TYPE, [other.public_key(), key.public_key()]) == b"payload"
    with pytest.raises(IntegrityError, match="untrusted"):
        open_envelope(envelope, DESIRED_TYPE, [other.public_key()])
    with pytest.raises(IntegrityError, match="untrusted"):
        open_envelope(envelope, DESIRED_TYPE, [])
    with pytest.raises(IntegrityError, match="wrong_type"):
        open_envelope(envelope, MANIFEST_TYPE, [key.public_key()])


def test_a_changed_payload_or_a_relabelled_type_breaks_the_signature() -> None:
    key = generate_key()
    envelope = json.loads(sign_envelope(DESIRED_TYPE, b"payload", key))
    changed = {**envelope, "payload": base64.b64encode(b"Payload").decode()}
    relabelled = {**envelope, "payloadType": MANIFEST_TYPE}
    for forged, expected in ((changed, DESIRED_TYPE), (relabelled, MANIFEST_TYPE)):
        with pytest.raises(IntegrityError, match="untrusted"):
            open_envelope(json.dumps(forged).encode(), expected, [key.public_key()])


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b'{"payload": "!"}', b"[" * 50_000, b"\xff"])
def test_bytes_that_are_no_envelope_are_malformed(raw: bytes) -> None:
    with pytest.raises(IntegrityError, match="malformed"):
        open_envelope(raw, DESIRED_TYPE, [])


def test_keys_survive_the_trip_through_pem_and_garbage_does_not_leak() -> None:
    key = generate_key()
    assert load_private_key(private_key_to_pem(key)).public_key() == key.public_key()
    assert load_public_key(public_key_to_pem(key.public_key())) == key.public_key()
    with pytest.raises(PermanentError) as caught:
        load_private_key(b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n")
    assert "c2VjcmV0" not in str(caught.value)


@pytest.mark.parametrize("level", ["", "a/b", "+", "#", "$SYS", "a\x00", "x" * 100])
def test_a_name_that_would_change_the_meaning_of_a_topic_is_refused(level: str) -> None:
    with pytest.raises(PermanentError, match=r"topic\.invalid"):
        NodeTopics("site", level)
    with pytest.raises(PermanentError, match=r"topic\.invalid"):
        decision_topic("{site}/_edgeai/{task}", {"site": level, "task": "triage"})


def test_a_topic_of_another_node_names_no_task() -> None:
    topics = NodeTopics("s", "n")
    assert topics.task_of("edge/v1/s/n/events/triage") == "triage"
    assert topics.task_of("edge/v1/s/other/events/triage") is None
    assert topics.task_of("edge/v1/s/n/events/a/b") is None
