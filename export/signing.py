"""Who vouches for a bundle: the developer's own key by default, any Ed25519 key by choice.

The default key is created on first use, and its public half goes to the folder that ``edge-agent decide`` trusts, so
that a bundle built on this machine runs on this machine. Devices trust only what their operator installs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.contract.dsse import (
    MANIFEST_TYPE,
    generate_key,
    load_private_key,
    private_key_to_pem,
    public_key_to_pem,
    sign_envelope,
)
from edge_agent.contract.manifest import MANIFEST_NAME, SIGNATURE_NAME, read_manifest, verify_files
from edge_agent.errors import PermanentError, from_os_error
from edge_agent.fs import write_atomic


def config_dir() -> Path:
    """``$XDG_CONFIG_HOME/edge-agent`` or ``~/.config/edge-agent``."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "edge-agent"


def load_signing_key(path: Path | None) -> Ed25519PrivateKey:
    """Read the key to sign with; None means the developer's own, created if it is not there.

    Raises:
        PermanentError: ``key.unreadable`` or ``key.invalid``.
    """
    if path is None:
        path = config_dir() / "keys" / "developer.pem"
        if not path.exists():
            return _create_developer_key(path)
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise PermanentError("key.unreadable", f"cannot read key {path}: {error.strerror}", path=str(path)) from error
    return load_private_key(pem)


def sign_bundle(bundle: Path, key: Ed25519PrivateKey) -> str:
    """Sign a whole bundle.

    Args:
        bundle: its directory; every listed file is hashed first, so that a damaged bundle is never vouched for.
        key: the private key.

    Returns:
        The bundle's digest (hex SHA-256 of the manifest).

    Raises:
        EdgeError: ``bundle.*`` when the bundle is not whole.
    """
    manifest, digest = read_manifest(bundle)
    verify_files(bundle, manifest)
    envelope = sign_envelope(MANIFEST_TYPE, (bundle / MANIFEST_NAME).read_bytes(), key)
    write_atomic(bundle / SIGNATURE_NAME, envelope, mode=0o644)
    return digest


def _create_developer_key(path: Path) -> Ed25519PrivateKey:
    key = generate_key()
    trusted = config_dir() / "trusted" / path.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        trusted.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise from_os_error(error, "creating the key folder") from error
    # Trust first: a private key without its public half would sign bundles that this machine refuses.
    write_atomic(trusted, public_key_to_pem(key.public_key()), mode=0o644)
    write_atomic(path, private_key_to_pem(key), mode=0o600)
    sys.stderr.write(f"edge-export: created signing key {path} (public half: {trusted})\n")
    return key
