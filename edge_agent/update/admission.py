"""Which orders a node accepts: the rules between a signature that verifies and work that starts. No I/O.

Order of the checks: first those that make the order not ours (node), then replay (revision), then those that make it
one that must not be carried out. Only orders that pass the first two move the revision floor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from pydantic import ValidationError

from edge_agent.contract.messages import DesiredState
from edge_agent.errors import EdgeError, RefusedError
from edge_agent.update.machine import RULES, Record

_RELEASE = re.compile(
    r"^(?P<name>[a-z0-9][a-z0-9._-]{0,63})/(?P<version>[a-z0-9][a-z0-9._-]{0,63})/(?P<target>[a-z0-9][a-z0-9_-]{0,31})"
    r"/manifest\.json$"
)
_PARTS = re.compile(r"[0-9]+|[a-z]+")
_ZERO = (3, 0, "")
# Words that come before the bare number, as in PEP 440 and SemVer: 1.0rc1 < 1.0 < 1.0.1.
_EARLIER = ("dev", "alpha", "a", "beta", "b", "pre", "preview", "c", "rc")


@dataclass(frozen=True)
class Release:
    """The parts of a release path, ``<name>/<version>/<target>/manifest.json``."""

    name: str
    version: str
    target: str


def parse_release(path: str) -> Release:
    """Split a release path.

    Raises:
        RefusedError: ``update.release_invalid``.
    """
    match = _RELEASE.match(path)
    if match is None or ".." in path:
        raise RefusedError("update.release_invalid", f"{path!r} is not <name>/<version>/<target>/manifest.json")
    return Release(match["name"], match["version"], match["target"])


def version_key(version: str) -> tuple[tuple[int, int, str], ...]:
    """Natural order of version strings within one model name.

    Digits compare as numbers, words alphabetically; a word such as ``rc`` comes before nothing, nothing before a
    number, so ``1.0rc1 < 1.0 < 1.0.1 < 1.0.10``; a leading ``v`` and the separators do not count, nor does what
    follows a ``+`` (which a version cannot contain here).
    """
    parts = _PARTS.findall(version.removeprefix("v"))
    # (kind, number, word): 0 = pre-release word, 1 = end, 2 = other word, 3 = number
    key = [
        (3, int(part), "") if part.isdigit() else (0 if part in _EARLIER else 2, _rank(part), part) for part in parts
    ]
    # 1.0 is 1, and 1.0rc1 comes before it: zeros that no number follows do not count.
    kept = [part for i, part in enumerate(key) if part != _ZERO or _number_follows(key[i:])]
    return (*kept, (1, 0, ""))


def parse_desired(payload: bytes) -> DesiredState:
    """Read the signed payload of a desired envelope.

    Raises:
        RefusedError: ``update.desired_invalid``.
    """
    try:
        order = DesiredState.model_validate_json(payload)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        raise RefusedError("update.desired_invalid", f"desired state does not fit the contract: {faults}") from error
    if order.not_after.tzinfo is None:
        raise RefusedError("update.desired_invalid", "not_after needs a time zone: a local hour is no moment")
    return order


@dataclass(frozen=True)
class Facts:
    """What admission looks at beside the order.

    Args:
        node: this node's name.
        target: this node's target, None where any may be installed.
        now: reference time (UTC).
        record: the updater's record.
        active_name: name of the active bundle, None before the first installation.
        active_version: its version.
        active_digest: its digest.
    """

    node: str
    target: str | None
    now: datetime
    record: Record
    active_name: str | None = None
    active_version: str | None = None
    active_digest: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What becomes of an order.

    Args:
        accepted: start (or continue) work on it.
        authentic: it moves the revision floor and is answered under its own revision.
        error: why it was refused; None also for an order that is merely a repetition.
    """

    accepted: bool
    authentic: bool
    error: EdgeError | None = None


REPEATED = Verdict(accepted=False, authentic=False)


def admit(order: DesiredState, facts: Facts) -> Verdict:
    """Judge an order whose signature was verified.

    Args:
        order: the order.
        facts: the node's situation.

    Returns:
        Accepted, refused with an error (``update.wrong_node``, ``update.stale_rev``, ``update.release_invalid``,
        ``update.wrong_target``, ``update.expired``, ``update.known_bad``, ``update.downgrade``), or `REPEATED`.
    """
    record = facts.record
    if order.node != facts.node:
        return _not_ours(RefusedError("update.wrong_node", f"order for node {order.node!r}, this is {facts.node!r}"))
    if order.rev < record.rev_seen:
        detail = f"revision {order.rev} is older than {record.rev_seen}"
        return _not_ours(RefusedError("update.stale_rev", detail, rev=order.rev, rev_seen=record.rev_seen))
    if order.rev == record.rev_seen:
        if record.digest_seen not in (order.digest, None):
            detail = f"revision {order.rev} was used for another digest before"
            return _not_ours(RefusedError("update.stale_rev", detail, rev=order.rev, rev_seen=record.rev_seen))
        if _is_settled(order, facts):
            return REPEATED
    try:
        _check_content(order, facts)
    except RefusedError as error:
        return Verdict(accepted=False, authentic=True, error=error)
    return Verdict(accepted=True, authentic=True)


def _check_content(order: DesiredState, facts: Facts) -> None:
    release = parse_release(order.release)
    if facts.target is not None and release.target != facts.target:
        raise RefusedError("update.wrong_target", f"release is for {release.target}, this node is {facts.target}")
    if order.not_after <= facts.now:
        raise RefusedError("update.expired", f"order expired at {order.not_after.isoformat()}")
    if order.digest == facts.active_digest:
        return  # nothing will be installed, so neither marks nor versions matter
    failed_in = facts.record.bad.get(order.digest)
    if failed_in is not None and not order.retry_bad:
        raise RefusedError("update.known_bad", f"this digest failed on this node in revision {failed_in}")
    floor = facts.record.committed.get(release.name)
    if floor is None and release.name == facts.active_name:
        floor = facts.active_version
    if floor is not None and not order.allow_downgrade and version_key(release.version) < version_key(floor):
        raise RefusedError("update.downgrade", f"{release.name} {release.version} is older than {floor}")


def _is_settled(order: DesiredState, facts: Facts) -> bool:
    """Whether the same revision needs no work: under way, reached (and not lost since), or failed by the model's own
    fault.

    A retained order comes again with every reconnect. One that failed for the registry's or the network's sake is
    tried again then; nothing would ever bring it back otherwise.
    """
    record = facts.record
    requests = [r for r in (record.request, record.waiting) if r is not None and r.rev == order.rev]
    if not requests:
        return False
    if record.phase in RULES:
        return True
    if record.phase == "committed":
        return facts.active_digest == order.digest
    return order.digest in record.bad and record.bad[order.digest] == order.rev


def _not_ours(error: RefusedError) -> Verdict:
    return Verdict(accepted=False, authentic=False, error=error)


def _number_follows(parts: list[tuple[int, int, str]]) -> bool:
    significant = next((part for part in parts if part != _ZERO), None)
    return significant is not None and significant[0] == _ZERO[0]


def _rank(word: str) -> int:
    return _EARLIER.index(word) if word in _EARLIER else 0
