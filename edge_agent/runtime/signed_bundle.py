"""From a directory on disk to bytes that may be loaded: who signed it, and is every file what was signed.

Nothing is handed to the tokenizer, the graph loader or the YAML parser before both questions are answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.contract.dsse import MANIFEST_TYPE, load_public_key, open_envelope
from edge_agent.contract.manifest import MANIFEST_NAME, SIGNATURE_NAME
from edge_agent.errors import IntegrityError, PermanentError, from_os_error
from edge_agent.runtime.bundle import VerifiedBundle, read_bounded, verify_contents

PACKAGED_KEYS = Path(__file__).resolve().parent.parent / "keys"
MAX_KEY_BYTES = 64 << 10


def open_signed_bundle(path: Path, trusted_keys: Sequence[Ed25519PublicKey]) -> VerifiedBundle:
    """Open a bundle that carries its own signature, ``manifest.sig.json``.

    Args:
        path: the bundle's directory.
        trusted_keys: publishers' keys, of which any one suffices.

    Returns:
        The verified bundle.

    Raises:
        PermanentError: ``bundle.missing`` when there is no manifest.
        IntegrityError: ``bundle.unsigned``, ``signature.*``, ``bundle.manifest_mismatch``, ``bundle.manifest_invalid``,
            ``bundle.file_missing``, ``bundle.file_truncated`` or ``bundle.file_corrupt``.
        RefusedError: ``bundle.format_unsupported``.
    """
    manifest_bytes = read_bounded(path / MANIFEST_NAME, "bundle.missing")
    envelope = read_bounded(path / SIGNATURE_NAME, "bundle.unsigned")
    signed = open_envelope(envelope, MANIFEST_TYPE, trusted_keys)
    if signed != manifest_bytes:
        raise IntegrityError("bundle.manifest_mismatch", f"{MANIFEST_NAME} differs from what was signed")
    return verify_contents(path, signed)


def default_trust_places() -> tuple[Path, ...]:
    """Where publishers' keys are always looked for: in the package, then in the user's directory."""
    try:
        return (PACKAGED_KEYS, Path.home() / ".config" / "edge-agent" / "trusted")
    except RuntimeError:  # a user id without a home
        return (PACKAGED_KEYS,)


def load_trusted_keys(given: Iterable[Path] = (), *, places: Iterable[Path] | None = None) -> list[Ed25519PublicKey]:
    """Collect public keys.

    Args:
        given: further PEM files, or directories of them.
        places: directories of ``*.pem`` files that are read first; default: `default_trust_places`. An absent one
            holds no keys.

    Returns:
        The keys, in order of place and name.

    Raises:
        PermanentError: ``key.invalid`` naming the file, or ``disk.*`` when it cannot be read.
    """
    always = default_trust_places() if places is None else tuple(places)
    files = [file for place in always for file in sorted(place.glob("*.pem"))]
    for path in given:
        files.extend(sorted(path.glob("*.pem")) if path.is_dir() else [path])
    return [_load_key(file) for file in files]


def _load_key(file: Path) -> Ed25519PublicKey:
    try:
        with file.open("rb") as reader:
            pem = reader.read(MAX_KEY_BYTES)
    except OSError as error:
        raise from_os_error(error, f"reading key {file.name}") from error
    try:
        return load_public_key(pem)
    except PermanentError as error:
        raise PermanentError(error.code, f"{file}: {error.detail}", path=str(file)) from error
