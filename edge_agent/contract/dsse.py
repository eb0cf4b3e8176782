"""DSSE envelopes with Ed25519: how a manifest and a desired state are signed.

Source: https://github.com/secure-systems-lab/dsse/blob/master/envelope.md (v1.0.2), keyid = SHA-256 of the raw
public key. TUF metadata has its own format; this is for the documents that TUF does not carry.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from edge_agent.errors import IntegrityError, PermanentError

MANIFEST_TYPE = "application/vnd.edge-agent.manifest.v1+json"
DESIRED_TYPE = "application/vnd.edge-agent.desired.v1+json"


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """PAE of DSSE: the exact bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def key_id(key: Ed25519PublicKey) -> str:
    """Hex SHA-256 of the raw 32-byte public key."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()


def sign_envelope(payload_type: str, payload: bytes, key: Ed25519PrivateKey) -> bytes:
    """Wrap ``payload`` in a signed envelope (JSON bytes)."""
    signature = key.sign(pre_authentication_encoding(payload_type, payload))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [{"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }
    return (json.dumps(envelope, sort_keys=True) + "\n").encode()


def open_envelope(envelope_bytes: bytes, payload_type: str, trusted: Iterable[Ed25519PublicKey]) -> bytes:
    """Verify an envelope and return its payload.

    Args:
        envelope_bytes: the JSON envelope as received.
        payload_type: the type that the caller expects; another one is refused even when well signed.
        trusted: keys of which any one suffices.

    Returns:
        The signed payload.

    Raises:
        IntegrityError: ``signature.malformed``, ``signature.wrong_type`` or ``signature.untrusted``.
    """
    try:
        envelope = json.loads(envelope_bytes)
        payload = base64.b64decode(envelope["payload"], validate=True)
        found_type = envelope["payloadType"]
        signatures = [base64.b64decode(s["sig"], validate=True) for s in envelope["signatures"]]
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise IntegrityError("signature.malformed", "not a DSSE envelope") from error
    if found_type != payload_type:
        raise IntegrityError("signature.wrong_type", f"envelope holds {found_type!r}, not {payload_type!r}")
    message = pre_authentication_encoding(payload_type, payload)
    keys = list(trusted)
    # keyid is a hint that an attacker controls, so every trusted key is tried (there are few).
    for signature in signatures[:8]:
        for key in keys:
            try:
                key.verify(signature, message)
            except InvalidSignature:
                continue
            return payload
    raise IntegrityError("signature.untrusted", "no signature by a trusted key")


def generate_key() -> Ed25519PrivateKey:
    """A new private key."""
    return Ed25519PrivateKey.generate()


def private_key_to_pem(key: Ed25519PrivateKey) -> bytes:
    """PKCS#8 PEM without a passphrase: the caller writes it with mode 0600."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_key_to_pem(key: Ed25519PublicKey) -> bytes:
    """SubjectPublicKeyInfo PEM."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def load_private_key(pem: bytes) -> Ed25519PrivateKey:
    """Read a PKCS#8 PEM.

    Raises:
        PermanentError: ``key.invalid``; the message never holds key material.
    """
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise PermanentError("key.invalid", "not an unencrypted PKCS#8 PEM private key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise PermanentError("key.invalid", "not an Ed25519 key")
    return key


def load_public_key(pem: bytes) -> Ed25519PublicKey:
    """Read a SubjectPublicKeyInfo PEM.

    Raises:
        PermanentError: ``key.invalid``.
    """
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise PermanentError("key.invalid", "not a PEM public key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise PermanentError("key.invalid", "not an Ed25519 key")
    return key
