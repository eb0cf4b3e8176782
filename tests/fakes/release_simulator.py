"""A registry with real keys and real signatures on plain files, which tests bend in every way an attacker could.

    simulator = ReleaseSimulator(tmp_path / "registry")
    release = simulator.publish("triage", "1.0.0", {"model/decoder.onnx": b"..."})
    envelope = simulator.order(release, node="press-4", rev=1)

`save` writes the current metadata; attacks change `timestamp`, `snapshot`, … (python-tuf objects) and sign again, or
overwrite files in `directory`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from edge_agent.contract.dsse import DESIRED_TYPE, generate_key, public_key_to_pem, sign_envelope
from edge_agent.contract.manifest import FileEntry, Manifest, ModelSpec, Resources
from edge_agent.contract.messages import DesiredState, release_path
from edge_agent.update.clock import BUILD_TIME

TARGET = "cpu-x86_64"
TASK_FILE = "tasks/triage/task.yaml"


def start_time() -> datetime:
    """Now, or the agent's build time where the machine's clock is behind it."""
    return max(datetime.now(UTC), BUILD_TIME).replace(microsecond=0) + timedelta(minutes=1)


@dataclass(frozen=True)
class Published:
    """A release in the registry."""

    path: str
    digest: str
    manifest: Manifest
    manifest_bytes: bytes


class ReleaseSimulator:
    """The publisher's side.

    Args:
        directory: what a web server would serve.
        now: the publisher's clock; expiry dates count from it.
    """

    def __init__(self, directory: Path, *, now: datetime | None = None) -> None:
        self.directory = directory
        self.now = now or start_time()
        self.root_signers = [CryptoSigner.generate_ed25519() for _ in range(2)]
        self.signers = {
            role: CryptoSigner.generate_ed25519() for role in ("targets", "releases", "snapshot", "timestamp")
        }
        self.desired_key = generate_key()
        self.root = Root(expires=self.now + timedelta(days=365), consistent_snapshot=True)
        for signer in self.root_signers:
            self.root.add_key(signer.public_key, "root")
        self.root.roles["root"].threshold = 2
        for role in ("targets", "snapshot", "timestamp"):
            self.root.add_key(self.signers[role].public_key, role)
        delegation = DelegatedRole("releases", [], threshold=1, terminating=True, paths=["*/*/*/*"])
        self.targets = Targets(
            expires=self.now + timedelta(days=90), delegations=Delegations(keys={}, roles={"releases": delegation})
        )
        self.targets.add_key(self.signers["releases"].public_key, "releases")
        self.releases = Targets(expires=self.now + timedelta(days=90))
        self.snapshot = Snapshot(
            expires=self.now + timedelta(days=7),
            meta={"targets.json": MetaFile(1), "releases.json": MetaFile(1)},
        )
        self.timestamp = Timestamp(expires=self.now + timedelta(days=1))
        self.write_root()
        self.save()

    def install_trust(self, trust_dir: Path) -> Path:
        """Write what a device is provisioned with: ``root.json`` and ``desired.pem``."""
        trust_dir.mkdir(parents=True, exist_ok=True)
        (trust_dir / "root.json").write_bytes((self.directory / "metadata" / "1.root.json").read_bytes())
        (trust_dir / "desired.pem").write_bytes(public_key_to_pem(self.desired_key.public_key()))
        return trust_dir

    def publish(self, name: str, version: str, files: dict[str, bytes], **manifest_fields: Any) -> Published:
        """Publish a release: blobs, manifest, metadata."""
        files = {"tokenizer.json": b"{}", TASK_FILE: b"name: triage\n", "model/decoder.onnx": b"model", **files}
        for content in files.values():
            self.write_blob(content)
        entries = tuple(
            FileEntry(path=path, size=len(content), sha256=hashlib.sha256(content).hexdigest())
            for path, content in sorted(files.items())
        )
        fields: dict[str, Any] = {
            "name": name,
            "version": version,
            "target": TARGET,
            "model": _MODEL,
            "tasks": ("triage",),
            "files": entries,
            "resources": Resources(disk_bytes=sum(e.size for e in entries), ram_bytes=1 << 20),
            **manifest_fields,
        }
        manifest = Manifest(**fields)
        return self.publish_manifest(release_path(name, version, TARGET), manifest)

    def publish_manifest(self, path: str, manifest: Manifest) -> Published:
        """Publish a manifest under a path of one's choice."""
        raw = manifest.to_bytes()
        target = TargetFile.from_data(path, raw, ["sha256"])
        digest = target.hashes["sha256"]
        directory, _, name = path.rpartition("/")
        self._write(f"targets/{directory}/{digest}.{name}", raw)
        self.releases.targets[path] = target
        self.bump(self.releases, self.snapshot, self.timestamp)
        self.save()
        return Published(path, digest, manifest, raw)

    def order(self, release: Published, *, node: str = "press-4", rev: int = 1, **fields: Any) -> bytes:
        """A signed desired envelope for a release."""
        values = {
            "node": node,
            "rev": rev,
            "release": release.path,
            "digest": release.digest,
            "not_after": self.now + timedelta(hours=12),
            "probation_decisions": 5,
            "probation_s": 10.0,
            **fields,
        }
        payload = DesiredState.model_validate(values).model_dump_json().encode()
        return sign_envelope(DESIRED_TYPE, payload, self.desired_key)

    def bump(self, *documents: Timestamp | Snapshot | Targets) -> None:
        """Raise versions by one."""
        for document in documents:
            document.version += 1

    def save(self) -> None:
        """Sign and write everything under the root, each listing the version of the one below it."""
        self.snapshot.meta["releases.json"] = self._write_signed(self.releases, "releases")
        self.snapshot.meta["targets.json"] = self._write_signed(self.targets, "targets")
        self.timestamp.snapshot_meta = self._write_signed(self.snapshot, "snapshot")
        self._write("metadata/timestamp.json", self.signed(self.timestamp, "timestamp"))

    def write_root(self) -> None:
        """Sign the root with both keys and write it under its version."""
        metadata = Metadata(self.root)
        for signer in self.root_signers:
            metadata.sign(signer, append=True)
        self._write(f"metadata/{self.root.version}.root.json", metadata.to_bytes())

    def rotate_online_keys(self) -> None:
        """New keys for timestamp and snapshot, under a new root."""
        for role in ("snapshot", "timestamp"):
            self.root.revoke_key(self.signers[role].public_key.keyid, role)
            self.signers[role] = CryptoSigner.generate_ed25519()
            self.root.add_key(self.signers[role].public_key, role)
        self.root.version += 1
        self.write_root()

    def signed(self, document: Timestamp | Snapshot | Targets, role: str) -> bytes:
        """A document's signed bytes."""
        metadata: Metadata[Any] = Metadata(document)
        metadata.sign(self.signers[role])
        return metadata.to_bytes()

    def metadata_state(self) -> dict[str, bytes]:
        """All metadata files, to be put back later (`restore`): the registry of yesterday."""
        return {path.name: path.read_bytes() for path in (self.directory / "metadata").iterdir()}

    def restore(self, state: dict[str, bytes]) -> None:
        """Serve former metadata again."""
        for path in (self.directory / "metadata").iterdir():
            path.unlink()
        for name, raw in state.items():
            self._write(f"metadata/{name}", raw)

    def write_blob(self, content: bytes) -> Path:
        """Put a blob in its place."""
        digest = hashlib.sha256(content).hexdigest()
        return self._write(f"blobs/sha256/{digest[:2]}/{digest}", content)

    def blob_path(self, content: bytes) -> Path:
        """Where a blob lies."""
        digest = hashlib.sha256(content).hexdigest()
        return self.directory / "blobs" / "sha256" / digest[:2] / digest

    def _write_signed(self, document: Snapshot | Targets, role: str) -> MetaFile:
        raw = self.signed(document, role)
        self._write(f"metadata/{document.version}.{role}.json", raw)
        return MetaFile.from_data(document.version, raw, ["sha256"])

    def _write(self, relative: str, content: bytes) -> Path:
        path = self.directory / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path


def edit_json(path: Path, **changes: Any) -> None:
    """Change signed metadata without signing it again."""
    document = json.loads(path.read_bytes())
    document["signed"].update(changes)
    path.write_text(json.dumps(document))


_MODEL = ModelSpec(
    decoder="model/decoder.onnx",
    tokenizer="tokenizer.json",
    architecture="llama",
    precision="int4",
    vocab_size=16,
    num_layers=1,
    num_kv_heads=1,
    head_dim=8,
    max_context_tokens=64,
    eos_token_id=1,
)
