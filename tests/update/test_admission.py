from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.messages import DesiredState
from edge_agent.errors import RefusedError
from edge_agent.update.admission import Facts, Verdict, admit, parse_desired, parse_release, version_key
from edge_agent.update.machine import Record

NOW = datetime(2027, 1, 1, tzinfo=UTC)
DIGEST, OTHER = "a" * 64, "b" * 64


def order(rev: int = 5, version: str = "2.0.0", **fields: Any) -> DesiredState:
    values: dict[str, Any] = {
        "node": "press-4",
        "rev": rev,
        "release": f"triage/{version}/cpu-x86_64/manifest.json",
        "digest": DIGEST,
        "not_after": NOW + timedelta(days=1),
        **fields,
    }
    return DesiredState(**values)


def judge(desired: DesiredState, record: Record | None = None, **facts: Any) -> Verdict:
    values: dict[str, Any] = {"node": "press-4", "target": "cpu-x86_64", "now": NOW, "record": record or Record()}
    return admit(desired, Facts(**{**values, **facts}))


def code(verdict: Verdict) -> str | None:
    return None if verdict.error is None else verdict.error.code


def test_versions_are_ordered_as_an_engineer_reads_them() -> None:
    ordered = ["0.9", "1.0.dev1", "1.0a2", "1.0beta1", "1.0rc1", "1.0", "1.0.1", "1.0.2", "1.0.10", "1.1", "1.10", "2"]
    assert all(version_key(one) < version_key(other) for one, other in pairwise(ordered))


@pytest.mark.parametrize(
    ("one", "other"), [("1", "1.0"), ("1.0", "1.0.0"), ("v1.2", "1.2"), ("1-2", "1.2"), ("1.0rc1", "1rc1")]
)
def test_versions_that_only_look_different_are_equal(one: str, other: str) -> None:
    assert version_key(one) == version_key(other)


def test_dates_and_words_have_an_order_too() -> None:
    assert version_key("2026.11.2") < version_key("2026.11.10")
    assert version_key("v9") < version_key("v10")
    assert version_key("1.0") < version_key("1.0.post1")


@given(*[st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,12}\Z")] * 3)
def test_version_order_is_total_for_any_string(one: str, two: str, three: str) -> None:
    keys = sorted([version_key(one), version_key(two), version_key(three)])
    assert keys[0] <= keys[1] <= keys[2]


@pytest.mark.parametrize(
    "path",
    ["triage/1", "triage/1/cpu/other.json", "/triage/1/cpu/manifest.json", "../1/cpu/manifest.json", "a/b/c/d/e"],
)
def test_a_path_that_is_no_release_is_refused(path: str) -> None:
    with pytest.raises(RefusedError) as caught:
        parse_release(path)
    assert caught.value.code == "update.release_invalid"
    assert code(judge(order(release=path))) == "update.release_invalid"


@pytest.mark.parametrize("payload", [b"", b"[]", b"{", b'{"node": "x"}', b"\xff", b'{"schema_version": 2}'])
def test_a_payload_outside_the_contract_is_refused(payload: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        parse_desired(payload)
    assert caught.value.code == "update.desired_invalid"


def test_an_expiry_without_a_time_zone_is_refused() -> None:
    payload = order(not_after=NOW.replace(tzinfo=None)).model_dump_json().encode()
    with pytest.raises(RefusedError, match="time zone"):
        parse_desired(payload)


def test_a_fresh_order_for_this_node_is_accepted() -> None:
    assert judge(order()) == Verdict(accepted=True, authentic=True)


def test_an_order_for_another_node_is_refused_and_moves_no_floor() -> None:
    verdict = judge(order(node="press-5"))
    assert (code(verdict), verdict.authentic) == ("update.wrong_node", False)


def test_a_replayed_older_revision_is_refused_and_moves_no_floor() -> None:
    verdict = judge(order(4), Record(rev_seen=5, digest_seen=OTHER))
    assert (code(verdict), verdict.authentic) == ("update.stale_rev", False)


def test_one_revision_cannot_name_two_digests() -> None:
    verdict = judge(order(5), Record(rev_seen=5, digest_seen=OTHER))
    assert (code(verdict), verdict.authentic) == ("update.stale_rev", False)


@pytest.mark.parametrize("phase", ["downloading", "trial", "probation", "committing", "rolling_back", "committed"])
def test_the_same_revision_under_way_or_reached_is_a_repetition(phase: Any) -> None:
    record = Record(phase=phase, request=order(), rev_seen=5, digest_seen=DIGEST)
    assert judge(order(), record, active_digest=DIGEST) == Verdict(accepted=False, authentic=False)


@pytest.mark.parametrize("active", [OTHER, None])
def test_the_same_revision_is_work_again_where_what_it_committed_was_lost(active: str | None) -> None:
    record = Record(phase="committed", request=order(), rev_seen=5, digest_seen=DIGEST)
    assert judge(order(), record, active_digest=active).accepted


def test_the_same_revision_is_tried_again_where_only_the_registry_had_failed() -> None:
    record = Record(phase="failed", request=order(), rev_seen=5, digest_seen=DIGEST)
    assert judge(order(), record).accepted


@pytest.mark.parametrize("phase", ["failed", "rolled_back"])
def test_the_same_revision_is_not_tried_again_where_the_model_had_failed(phase: Any) -> None:
    record = Record(phase=phase, request=order(), rev_seen=5, digest_seen=DIGEST, bad={DIGEST: 5})
    assert judge(order(), record) == Verdict(accepted=False, authentic=False)


def test_a_digest_that_failed_here_is_refused_under_a_newer_revision() -> None:
    verdict = judge(order(6), Record(rev_seen=5, bad={DIGEST: 5}))
    assert (code(verdict), verdict.authentic) == ("update.known_bad", True)


def test_a_digest_that_failed_here_is_tried_again_where_the_order_says_so() -> None:
    assert judge(order(6, retry_bad=True), Record(rev_seen=5, bad={DIGEST: 5})).accepted


def test_an_expired_order_is_refused() -> None:
    assert code(judge(order(not_after=NOW))) == "update.expired"
    assert code(judge(order(not_after=NOW - timedelta(days=400)))) == "update.expired"


def test_a_release_for_another_target_is_refused() -> None:
    assert code(judge(order(), target="cpu-arm64")) == "update.wrong_target"
    assert judge(order(), target=None).accepted


def test_a_downgrade_is_refused_without_the_signed_flag() -> None:
    active: dict[str, Any] = {"active_name": "triage", "active_version": "2.0.1", "active_digest": OTHER}
    assert code(judge(order(), **active)) == "update.downgrade"
    assert judge(order(allow_downgrade=True), **active).accepted


def test_a_detour_over_another_model_does_not_hide_a_downgrade() -> None:
    record = Record(committed={"triage": "3.0"})
    active: dict[str, Any] = {"active_name": "maintenance", "active_version": "1.0", "active_digest": OTHER}
    assert code(judge(order(), record, **active)) == "update.downgrade"


def test_another_model_name_has_no_order_with_this_one() -> None:
    assert judge(order(), active_name="maintenance", active_version="9.0", active_digest=OTHER).accepted


def test_the_active_digest_may_always_be_ordered() -> None:
    record = Record(bad={DIGEST: 2}, committed={"triage": "9"})
    assert judge(order(), record, active_digest=DIGEST).accepted
