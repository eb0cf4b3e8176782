from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.broker import BrokerAddress
from deploy.keys import Keys, init_keys
from deploy.registry import Registry
from edge_agent.contract.dsse import MANIFEST_TYPE, sign_envelope

MakeBundle = Callable[..., Path]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return init_keys(tmp_path / "keys")


@pytest.fixture
def registry(tmp_path: Path, keys: Keys) -> Registry:
    made = Registry(tmp_path / "registry", keys)
    made.init()
    return made


@pytest.fixture
def make_bundle(tmp_path: Path, keys: Keys) -> MakeBundle:
    """A bundle whose files are no model: nothing in publishing looks inside them."""

    def make(
        version: str = "1.0.0", *, weights: bytes = b"W" * 5000, task: bytes = b"name: triage\n", sign: bool = True
    ) -> Path:
        bundle = tmp_path / f"bundle-{version}-{hashlib.sha256(weights + task).hexdigest()[:8]}"
        files = {"model/decoder.onnx": weights, "tokenizer.json": b"{}", "tasks/triage/task.yaml": task}
        for path, content in files.items():
            (bundle / path).parent.mkdir(parents=True, exist_ok=True)
            (bundle / path).write_bytes(content)
        manifest = {
            "format": 1,
            "name": "triage",
            "version": version,
            "target": "cpu-x86_64",
            "model": {
                "decoder": "model/decoder.onnx",
                "tokenizer": "tokenizer.json",
                "architecture": "llama",
                "precision": "int4",
                "vocab_size": 16,
                "num_layers": 1,
                "num_kv_heads": 1,
                "head_dim": 8,
                "max_context_tokens": 64,
                "eos_token_id": 0,
            },
            "tasks": ["triage"],
            "files": [
                {"path": path, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                for path, content in files.items()
            ],
            "resources": {"disk_bytes": 1, "ram_bytes": 1},
        }
        raw = json.dumps(manifest).encode()
        (bundle / "manifest.json").write_bytes(raw)
        if sign:
            (bundle / "manifest.sig.json").write_bytes(sign_envelope(MANIFEST_TYPE, raw, keys.private("publisher")))
        return bundle

    return make


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[BrokerAddress]:
    binary = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    assert binary, "the `needs` marker should have skipped this test"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    config = tmp_path / "mosquitto.conf"
    acl = tmp_path / "acl"
    acl.write_text("topic readwrite edge/#\ntopic deny edge/v1/+/forbidden/#\n")
    # As root mosquitto would become another user, who cannot read pytest's directory.
    config.write_text(f"user root\nlistener {port} 127.0.0.1\nallow_anonymous true\nacl_file {acl}\n")
    acl.chmod(0o644)
    child = subprocess.Popen([binary, "-c", str(config)], stderr=subprocess.PIPE)
    try:
        _wait_until_listening(child)
        yield BrokerAddress("127.0.0.1", port, timeout_s=5.0)
    finally:
        child.terminate()
        child.communicate(timeout=10)


def _wait_until_listening(child: subprocess.Popen[bytes]) -> None:
    assert child.stderr
    for line in child.stderr:
        if b" running" in line:
            return
    raise AssertionError("mosquitto ended before it listened")
