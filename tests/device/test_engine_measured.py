"""Golden examples and the device's own bench: what an engine says of itself."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable

import pytest

from edge_agent.errors import EdgeError
from edge_agent.runtime.bench import bench
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.golden import run_golden
from tests.device.test_engine import some_events
from tests.fakes.bundles import BundleVariant


def test_golden_examples_of_the_bundle_are_answered(engine: Engine) -> None:
    outcome = run_golden(engine)
    assert outcome.total == len(engine.golden("triage")) > 0
    assert outcome.wrong == ()


def test_golden_example_that_cannot_be_decided_is_wrong_with_the_code(variant: Callable[[], BundleVariant]) -> None:
    bundle = variant()
    golden = (bundle.path / "tasks/triage/golden.jsonl").read_text().splitlines()[0]
    example = json.loads(golden)
    example["event"] = {"nothing": "the template knows"}
    bundle.put("tasks/triage/golden.jsonl", json.dumps(example))
    bundle.seal()
    outcome = run_golden(Engine(bundle.open(), 1))
    assert [miss.error for miss in outcome.wrong] == ["event.no_known_field"]
    assert outcome.p95_ms == 0.0


def test_bench_reports_the_contracted_figures(engine: Engine) -> None:
    figures = bench(engine, "triage", some_events(4), seconds=0.2)
    contracted = {
        "decisions_per_s", "p50_ms", "p95_ms", "decode_tok_per_s", "prefill_tok_per_s",
        "peak_rss_bytes", "load_s", "first_decision_s", "tokens_out", "passes",
        "prefix_prefill_ms", "event_prefill_ms", "decode_pass_ms", "prefix_tokens", "event_tokens",
    }  # fmt: skip
    assert contracted <= set(figures)
    assert all(figures[name] > 0 for name in contracted)
    assert figures["machine"].startswith(platform.machine())
    with pytest.raises(EdgeError, match="no event"):
        bench(engine, "triage", [], seconds=0.1)


def test_bench_leaves_the_prefix_as_it_was(variant: Callable[[], BundleVariant]) -> None:
    engine = Engine(variant().open(), 1)
    event = some_events(1)[0]
    before = engine.decide("triage", event, deadline_s=30)
    bench(engine, "triage", some_events(2), seconds=0.1)
    after = engine.decide("triage", event, deadline_s=30)
    assert after.decision == before.decision
    assert after.confidence == pytest.approx(before.confidence, abs=1e-6)
