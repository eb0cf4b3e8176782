"""Bundles made from a real one: changed on purpose, then listed and signed as a publisher would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_agent.contract.dsse import MANIFEST_TYPE, sign_envelope
from edge_agent.contract.manifest import MANIFEST_NAME, SIGNATURE_NAME, manifest_digest
from edge_agent.fs import sha256_file
from edge_agent.runtime.bundle import VerifiedBundle, open_installed_bundle


class BundleVariant:
    """A private copy of ``source`` in ``path``."""

    def __init__(self, source: Path, path: Path, key: Ed25519PrivateKey) -> None:
        shutil.copytree(source, path)
        self.path = path
        self.key = key
        self.seal()

    @property
    def public_key(self) -> Ed25519PublicKey:
        return self.key.public_key()

    @property
    def digest(self) -> str:
        return manifest_digest((self.path / MANIFEST_NAME).read_bytes())

    def seal(self, change: Callable[[dict[str, Any]], None] | None = None) -> None:
        """List every file as it is now, apply ``change`` to the manifest, and sign it."""
        manifest: dict[str, Any] = json.loads((self.path / MANIFEST_NAME).read_text())
        manifest["tasks"] = sorted(p.parent.name for p in self.path.glob("tasks/*/task.yaml"))
        manifest["files"] = [
            {"path": str(f.relative_to(self.path)), "size": f.stat().st_size, "sha256": sha256_file(f)}
            for f in sorted(self.path.rglob("*"))
            if f.is_file() and f.name not in (MANIFEST_NAME, SIGNATURE_NAME)
        ]
        if change is not None:
            change(manifest)
        raw = json.dumps(manifest).encode()
        (self.path / MANIFEST_NAME).write_bytes(raw)
        (self.path / SIGNATURE_NAME).write_bytes(sign_envelope(MANIFEST_TYPE, raw, self.key))

    def put(self, name: str, content: str | bytes) -> None:
        """Write one file (call `seal` afterwards, or do not and have a bundle that was tampered with)."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def drop(self, name: str) -> None:
        path = self.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def open(self) -> VerifiedBundle:
        return open_installed_bundle(self.path, self.digest)


TASK_YAML = """\
name: triage
version: 1
prompt:
  prefix: "Triage.\\n"
  event: [{field: text, label: text}]
output: {type: object, properties: {severity: {enum: [low, high]}}}
"""


def bundle_of_task(path: Path, task_yaml: str = TASK_YAML, *, golden: str | None = None) -> tuple[Path, str]:
    """A directory that reads as a bundle but holds no model, for fakes that need none; its path and digest."""
    files = {"model/decoder.onnx": b"", "tokenizer.json": b"{}", "tasks/triage/task.yaml": task_yaml.encode()}
    if golden is not None:
        files["tasks/triage/golden.jsonl"] = golden.encode()
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    model = {
        "decoder": "model/decoder.onnx",
        "tokenizer": "tokenizer.json",
        "architecture": "none",
        "precision": "none",
    }
    shape = {"vocab_size": 2, "num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "max_context_tokens": 16}
    manifest = {
        "name": "triage",
        "version": "1.0.0",
        "target": "cpu-x86_64",
        "model": {**model, **shape, "eos_token_id": 1},
        "tasks": ["triage"],
        "files": [{"path": n, "size": len(c), "sha256": sha256_file(path / n)} for n, c in files.items()],
        "resources": {"disk_bytes": 0, "ram_bytes": 0},
    }
    raw = json.dumps(manifest).encode()
    (path / MANIFEST_NAME).write_bytes(raw)
    return path, manifest_digest(raw)
