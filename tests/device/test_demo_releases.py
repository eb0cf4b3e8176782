"""The demo's releases are what they are said to be, judged by the engine on the bundle that they are made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deploy.demo.bundles import LONG_PASS_TOKENS, Variant, make_variants
from deploy.demo.events import EventStream
from edge_agent.contract.manifest import read_manifest, verify_files
from edge_agent.errors import EdgeError, IntegrityError
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.engine import Engine

TASK = "triage"


@pytest.fixture(scope="module")
def variants(reference_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Variant]:
    return {v.label: v for v in make_variants(reference_bundle, tmp_path_factory.mktemp("variants"))}


def engine_on(variant: Variant) -> Engine:
    return Engine(open_installed_bundle(variant.bundle, read_manifest(variant.bundle)[1]), 1)


def wrong_goldens(engine: Engine) -> int:
    golden = engine.prepared(TASK).task.golden
    assert golden
    return sum(engine.decide(TASK, dict(g.event), deadline_s=10).decision != dict(g.decision) for g in golden)


@pytest.mark.parametrize("label", ["v1", "v2", "v4"])
def test_releases_that_pass_their_trial_answer_every_golden_example(variants: dict[str, Variant], label: str) -> None:
    assert wrong_goldens(engine_on(variants[label])) == 0


def test_damaged_release_is_whole_and_loads_and_answers_wrongly(variants: dict[str, Variant]) -> None:
    manifest, _ = read_manifest(variants["v3"].bundle)
    verify_files(variants["v3"].bundle, manifest)
    assert wrong_goldens(engine_on(variants["v3"])) > 0


def test_starving_release_answers_short_events_and_runs_out_of_memory_on_long_ones(
    variants: dict[str, Variant],
) -> None:
    engine, stream = engine_on(variants["v4"]), EventStream()
    codes = set()
    for _ in range(60):
        event = stream.next("load")
        long = len(engine.encode_event(TASK, event)) > LONG_PASS_TOKENS
        assert long == str(event["text"]).startswith("fault dump")
        try:
            engine.decide(TASK, event, deadline_s=10)
            assert not long
        except EdgeError as error:
            assert long
            codes.add(error.code)
    assert codes == {"worker.out_of_memory"}


def test_no_golden_example_is_long(variants: dict[str, Variant]) -> None:
    engine = engine_on(variants["v1"])
    longest = max(len(engine.encode_event(TASK, dict(g.event))) for g in engine.prepared(TASK).task.golden)
    assert longest < LONG_PASS_TOKENS


def test_second_release_shares_its_weights_with_the_first(variants: dict[str, Variant]) -> None:
    first, second = ({f.path: f.sha256 for f in read_manifest(variants[v].bundle)[0].files} for v in ("v1", "v2"))
    assert {path for path in first if first[path] != second[path]} == {f"tasks/{TASK}/task.yaml"}


def test_incomplete_bundle_is_refused_before_anything_is_made_of_it(reference_bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(reference_bundle, broken)
    manifest = json.loads((broken / "manifest.json").read_text())
    (broken / manifest["model"]["decoder"]).unlink()
    with pytest.raises(IntegrityError) as caught:
        make_variants(broken, tmp_path / "out")
    assert caught.value.code == "bundle.file_missing"
    assert not (tmp_path / "out").exists()
