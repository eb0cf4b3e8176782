"""The committed bundle is what the exporter makes of the committed checkpoint; it is signed, small and right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_agent.contract.document import to_document
from edge_agent.contract.dsse import generate_key
from edge_agent.contract.manifest import Manifest, read_manifest
from edge_agent.runtime.bundle import VerifiedBundle
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.signed_bundle import PACKAGED_KEYS, load_trusted_keys, open_signed_bundle
from export.build import build
from export.bundle import tool_versions
from export.proof.evaluate import evaluate, read_labelled, without_curves
from export.proof.greedy import GreedyDecoder
from export.proof.measure import bundle_backend
from export.reference.bundle_build import BUNDLE, HELDOUT, QUALITY, reference_request
from tests.export.conftest import QUIET

MAX_BYTES = 6_000_000
REPORTS = {"report.json", "report.html"}


@pytest.fixture(scope="module")
def bundle() -> VerifiedBundle:
    return open_signed_bundle(BUNDLE, load_trusted_keys([PACKAGED_KEYS]))


@pytest.fixture(scope="module")
def engine(bundle: VerifiedBundle) -> Engine:
    return Engine(bundle, threads=1)


def without_measured(manifest: Manifest) -> dict[str, Any]:
    """The manifest less what other machines and library versions may change: reports, versions, the reports' sizes."""
    dumped = to_document(manifest)
    dumped["files"] = [entry for entry in dumped["files"] if entry["path"] not in REPORTS]
    del dumped["provenance"]["tools"], dumped["resources"]
    return dumped


def test_committed_bundle_is_what_the_exporter_makes_of_the_committed_checkpoint(
    bundle: VerifiedBundle, tmp_path: Path
) -> None:
    rebuilt = tmp_path / "bundle"
    result = build(reference_request(), rebuilt, generate_key(), QUIET)
    assert without_measured(result.manifest) == without_measured(bundle.manifest)
    committed_report = json.loads((BUNDLE / "report.json").read_text())
    same_measurement = committed_report["parity"] == result.report["parity"]
    if same_measurement and bundle.manifest.provenance["tools"] == tool_versions():
        assert result.digest == bundle.digest
    else:  # other kernels or other versions: the figures may move a little, nothing else may
        agreement = result.report["parity"]["int4_against_fp32"]
        assert agreement["positions"] == committed_report["parity"]["int4_against_fp32"]["positions"]
        assert agreement["top1_agreement"] > 0.9


def test_committed_bundle_is_signed_by_the_packaged_key_and_small(bundle: VerifiedBundle) -> None:
    total = sum(path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file())
    assert total <= MAX_BYTES
    assert bundle.manifest.model.precision.startswith("int4-")
    assert bundle.manifest.tasks == ("triage",)


def test_nothing_lies_in_the_bundle_that_was_not_signed(bundle: VerifiedBundle) -> None:
    found = {path.relative_to(BUNDLE).as_posix() for path in BUNDLE.rglob("*") if path.is_file()}
    assert found == {"manifest.json", "manifest.sig.json", *(entry.path for entry in bundle.manifest.files)}


def test_golden_examples_are_answered_right_and_surely(engine: Engine) -> None:
    examples = engine.golden("triage")
    assert len(examples) >= 20
    for example in examples:
        answer = engine.decide("triage", dict(example.event), deadline_s=30)
        assert answer.decision == example.decision
        # A margin, so that the rounding of another processor's kernels cannot turn the answer.
        assert min(answer.confidence.values()) >= 0.7


def test_golden_examples_cover_what_can_go_wrong(engine: Engine) -> None:
    examples = engine.golden("triage")
    assert len({example.decision["category"] for example in examples}) >= 8
    assert len({example.decision["severity"] for example in examples}) >= 4
    lengths = [len(str(example.event.get("text") or "")) for example in examples]
    assert min(lengths) < 40
    assert max(lengths) > 90


def test_engine_answers_as_the_oracle(engine: Engine, bundle: VerifiedBundle) -> None:
    model = bundle.manifest.model
    oracle = GreedyDecoder(BUNDLE / model.decoder, BUNDLE / model.tokenizer, model)
    task = engine.tasks["triage"]
    rows = read_labelled(HELDOUT, task, limit=150)
    agree = 0
    for row in rows:
        event = dict(row.event)
        decision, _ = task.apply_guards(event, oracle.decide(task, event).decision)
        agree += engine.decide("triage", event, deadline_s=30).decision == decision
    # INT4 kernels round one token and many tokens differently, which may turn a close call; never more than that.
    assert agree >= len(rows) - 2


def test_recorded_quality_is_what_the_engine_reaches(engine: Engine, bundle: VerifiedBundle) -> None:
    recorded = json.loads(QUALITY.read_text())
    assert bundle.manifest.quality == without_curves(recorded)
    task = engine.tasks["triage"]
    rows = read_labelled(HELDOUT, task, limit=300)
    with bundle_backend(BUNDLE, task) as decide:
        found = evaluate(decide, rows, task)
    for name, share in recorded["triage"]["int4"]["accuracy"].items():
        # Three standard errors of a share near 0.9 over 300 rows.
        assert found.accuracy[name] >= share - 0.052, name


def test_manifest_is_the_canonical_one() -> None:
    assert read_manifest(BUNDLE)[0].to_bytes() == (BUNDLE / "manifest.json").read_bytes()
