"""An event: what a machine, PLC or person reports and the device must decide on."""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from typing import Any

from edge_agent.errors import RefusedError

Scalar = str | int | float | bool | None
Event = dict[str, Scalar]
"""A flat JSON object. Nested values are refused: a task's template names fields, not paths."""

MAX_EVENT_BYTES = 64 * 1024
MAX_FIELDS = 64


def parse_event(raw: bytes | str, *, max_bytes: int = MAX_EVENT_BYTES) -> Event:
    """Parse one JSON event, refusing everything that could not be decided later.

    Args:
        raw: the payload as received, UTF-8 JSON.
        max_bytes: refuse larger payloads before parsing them.

    Returns:
        The event as a flat mapping.

    Raises:
        RefusedError: ``event.too_large``, ``event.not_utf8``, ``event.not_json``, ``event.not_object``,
            ``event.bad_field`` or ``event.empty``.
    """
    data = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    if len(data) > max_bytes:
        raise RefusedError("event.too_large", f"event of {len(data)} bytes exceeds {max_bytes}", size_bytes=len(data))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RefusedError("event.not_utf8", f"invalid UTF-8 at byte {error.start}") from error
    try:
        parsed = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RefusedError("event.not_json", f"not valid JSON: {error}") from error
    return check_event(parsed)


def check_event(parsed: Any) -> Event:
    """Check that a decoded JSON value is a flat event (see `parse_event` for what is raised)."""
    if not isinstance(parsed, dict):
        raise RefusedError("event.not_object", f"an event is a JSON object, not {type(parsed).__name__}")
    if not parsed:
        raise RefusedError("event.empty", "an event needs at least one field")
    if len(parsed) > MAX_FIELDS:
        raise RefusedError("event.bad_field", f"{len(parsed)} fields exceed {MAX_FIELDS}")
    for name, value in parsed.items():
        if not (value is None or isinstance(value, str | int | float | bool)):
            raise RefusedError("event.bad_field", f"field {name!r} must be a scalar, not {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise RefusedError("event.bad_field", f"field {name!r} is not a finite number")
    return parsed


def event_id(event: Event) -> str:
    """The event's own ``id``, or a digest of its canonical JSON when the sender gave none.

    A digest means that a sender who repeats an id-less event byte for byte gets one decision, which is what
    at-least-once delivery needs; senders who mean two distinct events give ids or timestamps.
    """
    given = event.get("id")
    if isinstance(given, str | int) and not isinstance(given, bool) and str(given).strip():
        # JSON may spell lone surrogates, which neither UTF-8 nor MQTT can carry.
        return str(given)[:128].encode("utf-8", "replace").decode()
    canonical = json.dumps(event, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256-" + hashlib.sha256(canonical.encode()).hexdigest()[:32]


def clean_text(value: str, max_chars: int) -> str:
    """Normalise free text for a prompt: NFKC, no control characters, single spaces, bounded.

    Line breaks delimit fields in the rendered prompt, so removing them here is what keeps an event's text from
    imitating another field or the answer.
    """
    # Bounded before normalising: NFKC can expand one code point to 18.
    normal = unicodedata.normalize("NFKC", value[: max_chars * 4])
    # Cc/Cf/Cs/Zl/Zp: controls, invisible format characters, lone surrogates and Unicode line breaks.
    visible = "".join(" " if unicodedata.category(c) in _UNSAFE_CATEGORIES else c for c in normal)
    return " ".join(visible.split())[:max_chars].strip()


def printable(text: str) -> str:
    """``text`` on one line, with a mark in place of every control character: a terminal would obey those."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


_UNSAFE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
