"""The key directory: who may say what, and the part of it that goes on devices.

    KEYS/private/<role>.pem     mode 0600, one Ed25519 key a role; root1, root2, targets and releases belong offline
    KEYS/trust/root.json        TUF root, version 1, signed by both root keys
    KEYS/trust/desired.pem      may sign desired states
    KEYS/trust/publisher.pem    may sign bundles

Everything under ``trust`` is public and is what a device needs; nothing under ``private`` ever leaves the publisher.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.metadata import Metadata, Root

from deploy.metadata import sign
from edge_agent.contract import dsse
from edge_agent.errors import PermanentError, RefusedError, from_os_error
from edge_agent.fs import move_durable, write_atomic

ROOT_SIGNERS = ("root1", "root2")
TUF_SIGNERS = ("targets", "releases", "snapshot", "timestamp")
DOCUMENT_SIGNERS = ("desired", "publisher")
ALL_SIGNERS = (*ROOT_SIGNERS, *TUF_SIGNERS, *DOCUMENT_SIGNERS)
ROOT_LIFETIME = timedelta(days=365)


class Keys:
    """Reads one key directory; a key is loaded when it is used, so offline keys may be absent until then.

    Args:
        directory: what `init_keys` made.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def trust_dir(self) -> Path:
        """The public half: copy it to the devices."""
        return self.directory / "trust"

    def private(self, role: str) -> Ed25519PrivateKey:
        """The private key of a role.

        Raises:
            PermanentError: ``key.missing`` (perhaps kept offline) or ``key.invalid``.
        """
        return dsse.load_private_key(self._read(self.directory / "private" / f"{role}.pem", role))

    def signer(self, role: str) -> CryptoSigner:
        """The private key of a TUF role in the form that python-tuf signs with (raises as `private`)."""
        return CryptoSigner(self.private(role))

    def trusted_publishers(self) -> list[Ed25519PublicKey]:
        """Public keys whose signature on a bundle is accepted."""
        return [load_public_key_file(path) for path in sorted(self.trust_dir.glob("publisher*.pem"))]

    def trusted_desired(self) -> list[Ed25519PublicKey]:
        """Public keys that may sign desired states."""
        return [load_public_key_file(path) for path in sorted(self.trust_dir.glob("desired*.pem"))]

    def root_bytes(self) -> bytes:
        """The TUF root that anchors everything else."""
        return self._read(self.trust_dir / "root.json", "root")

    def _read(self, path: Path, role: str) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise PermanentError("key.missing", f"no {role} key at {path}; is it kept offline?", role=role) from error
        except OSError as error:
            raise from_os_error(error, f"reading the {role} key") from error


def load_public_key_file(path: Path) -> Ed25519PublicKey:
    """Read a PEM public key.

    Raises:
        PermanentError: ``key.invalid``, or as mapped by `from_os_error`.
    """
    try:
        return dsse.load_public_key(path.read_bytes())
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}") from error


def init_keys(directory: Path, *, now: datetime | None = None) -> Keys:
    """Make every key and the first TUF root.

    The directory appears whole or not at all, so an interrupted ceremony leaves nothing half-trusted behind.

    Args:
        directory: must not exist, or be empty.
        now: start of the root's validity; None is the present.

    Raises:
        RefusedError: ``keys.exist``; keys are never overwritten, because losing one strands every device.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RefusedError("keys.exist", f"{directory} is not empty; keys are never overwritten", path=str(directory))
    with _staging(directory) as staging:
        keys = {role: dsse.generate_key() for role in ALL_SIGNERS}
        private, trust = staging / "private", staging / "trust"
        private.mkdir(mode=0o700)
        trust.mkdir(mode=0o755)
        for role, key in keys.items():
            write_atomic(private / f"{role}.pem", dsse.private_key_to_pem(key), mode=0o600)
        for role in DOCUMENT_SIGNERS:
            write_atomic(trust / f"{role}.pem", dsse.public_key_to_pem(keys[role].public_key()), mode=0o644)
        write_atomic(trust / "root.json", _first_root(keys, now or datetime.now(UTC)), mode=0o644)
        move_durable(staging, directory)
    return Keys(directory)


@contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))  # mkdtemp: mode 0700
    except OSError as error:
        raise from_os_error(error, f"creating {directory}") from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _first_root(keys: dict[str, Ed25519PrivateKey], now: datetime) -> bytes:
    expires = (now + ROOT_LIFETIME).replace(microsecond=0)
    root = Root(version=1, expires=expires, consistent_snapshot=True)
    # The delegated role `releases` is not here: `targets` names its key.
    for role, signers in {
        "root": ROOT_SIGNERS,
        "targets": ("targets",),
        "snapshot": ("snapshot",),
        "timestamp": ("timestamp",),
    }.items():
        for signer in signers:
            root.add_key(SSlibKey.from_crypto(keys[signer].public_key()), role)
    root.roles["root"].threshold = len(ROOT_SIGNERS)
    return sign(Metadata(root), *(CryptoSigner(keys[signer]) for signer in ROOT_SIGNERS))
