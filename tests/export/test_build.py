"""A build is whole or absent, equal for equal input, and refuses what a device would refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edge_agent.contract.dsse import MANIFEST_TYPE, load_private_key, load_public_key, open_envelope
from edge_agent.contract.manifest import read_manifest, verify_files
from edge_agent.errors import EdgeError
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.signed_bundle import open_signed_bundle
from export.build import BuildResult
from export.checkpoint.synth import synthesise
from export.checkpoint.token_table import FEWEST_TOKENS
from export.proof.greedy import GreedyDecoder
from export.quantisation.quantize import QuantSettings
from export.request import Identity, Measurement, read_quality
from export.signing import load_signing_key, sign_bundle
from tests.export.conftest import EVENTS, TASK, TINY, Build

ROOT = Path(__file__).resolve().parents[2]


def code_of(make_bundle: Build, out: Path, **changes: Any) -> str:
    # What stays is the work folder, for the next try.
    work = {f".{out.name}.work"}
    before = {path.name for path in out.parent.iterdir()}
    with pytest.raises(EdgeError) as caught:
        make_bundle(out, **changes)
    assert {path.name for path in out.parent.iterdir()} - work == before - work, "a failed build left something behind"
    return caught.value.code


def tree(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if name != "manifest.sig.json"}


def test_equal_input_gives_equal_bytes(int4_bundle: Path, make_bundle: Build, tmp_path: Path) -> None:
    make_bundle(tmp_path / "somewhere" / "else")
    assert tree(tmp_path / "somewhere" / "else") == tree(int4_bundle)


def test_no_path_and_no_clock_in_the_bundle(int4_bundle: Path, llama: Path, task_folder: Path) -> None:
    for name, content in tree(int4_bundle).items():
        for folder in (llama.parent, task_folder, int4_bundle):
            assert str(folder).encode() not in content, name
        assert str(time.gmtime().tm_year).encode() not in content, name


def test_bundle_is_whole_and_describes_itself(int4_bundle: Path) -> None:
    manifest, _ = read_manifest(int4_bundle)
    verify_files(int4_bundle, manifest)
    assert manifest.tasks == ("sort",)
    assert manifest.model.precision == "int4-k_quant-32"
    assert manifest.model.max_context_tokens == 256
    assert manifest.provenance["checkpoint"]["architecture"] == "llama"
    report = json.loads((int4_bundle / "report.json").read_text())
    assert report["parity"]["fp32_matches_transformers"] is True
    assert 0 < report["parity"]["int4_against_fp32"]["top1_agreement"] <= 1
    assert sum(report["size_bytes"].values()) < manifest.size_bytes
    assert "<script" not in (int4_bundle / "report.html").read_text()


# INT4 kernels quantise activations differently for one token and for many, and the engine takes many at once.
@pytest.mark.parametrize(("bundle", "tolerance"), [("int4_bundle", 0.05), ("fp32_bundle", 1e-4)])
def test_engine_and_oracle_agree(bundle: str, tolerance: float, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(bundle)
    manifest, digest = read_manifest(path)
    engine = Engine(open_installed_bundle(path, digest), threads=1)
    oracle = GreedyDecoder(path / manifest.model.decoder, path / manifest.model.tokenizer, manifest.model)
    task = engine.tasks["sort"]
    for event in EVENTS:
        answer = engine.decide("sort", event, deadline_s=30)
        decoded = oracle.decide(task, event)
        assert answer.decision == decoded.decision
        assert answer.confidence == pytest.approx(decoded.confidence(), abs=tolerance)


def test_large_tokenizer_is_shipped_as_a_table_that_answers_alike(make_bundle: Build, tmp_path: Path) -> None:
    synthesise("smollm2-135m", tmp_path / "checkpoint", layers=1, **{**TINY, "vocab_size": FEWEST_TOKENS})
    (tmp_path / "task.yaml").write_text(TASK)  # without golden examples: those of `task_folder` are another model's
    bundle = tmp_path / "bundle"
    make_bundle(bundle, checkpoint=tmp_path / "checkpoint", tasks=(tmp_path,))
    manifest, digest = read_manifest(bundle)
    assert manifest.model.token_table == "model/tokens.safetensors"
    assert manifest.model.token_table in {entry.path for entry in manifest.files}
    engine = Engine(open_installed_bundle(bundle, digest))
    library = TextEncoder(bundle / manifest.model.tokenizer, manifest.model.vocab_size)
    task = engine.tasks["sort"]
    assert engine.encode_prefix("sort") == library.encode(task.prompt.prefix)
    for event in EVENTS:
        assert engine.encode_event("sort", event) == library.encode(task.render(event))
        decoder = GreedyDecoder(bundle / manifest.model.decoder, bundle / manifest.model.tokenizer, manifest.model)
        assert engine.decide("sort", event, deadline_s=60.0).decision == decoder.decide(task, event).decision


def test_existing_bundle_is_not_replaced_unasked(make_bundle: Build, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    before = tree(tmp_path / "bundle")
    newer = Identity("tiny", "2.0.0", "cpu-x86_64")
    assert code_of(make_bundle, tmp_path / "bundle", identity=newer) == "export.out_exists"
    assert tree(tmp_path / "bundle") == before
    make_bundle(tmp_path / "bundle", identity=newer, force=True)
    assert read_manifest(tmp_path / "bundle")[0].version == "2.0.0"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_folder_that_is_no_bundle_is_never_replaced(make_bundle: Build, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.tex").write_text("years of work")
    assert code_of(make_bundle, tmp_path / "thesis", force=True) == "export.out_exists"


def test_target_that_nobody_knows_is_refused(make_bundle: Build, tmp_path: Path) -> None:
    assert code_of(make_bundle, tmp_path / "bundle", identity=Identity("a", "1", "toaster")) == "export.target_unknown"


def test_precision_that_the_target_cannot_have_is_refused(make_bundle: Build, tmp_path: Path) -> None:
    identity = Identity("tiny", "1", "qnn-htp")
    assert code_of(make_bundle, tmp_path / "bundle", identity=identity) == "export.precision_unsupported"


def test_chip_that_the_target_does_not_have_is_refused(make_bundle: Build, tmp_path: Path) -> None:
    assert code_of(make_bundle, tmp_path / "bundle", soc="QCS8550") == "export.soc_unknown"


def test_name_that_no_topic_could_carry_is_refused(make_bundle: Build, tmp_path: Path) -> None:
    identity = Identity("../Tiny", "1", "cpu-x86_64")
    assert code_of(make_bundle, tmp_path / "bundle", identity=identity) == "export.name_invalid"


def test_golden_example_that_the_model_fails_is_refused(make_bundle: Build, task_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "task.yaml").write_text(TASK)
    rows = [json.loads(line) for line in (task_folder / "golden.jsonl").read_text().splitlines()]
    rows[2]["decision"]["urgent"] = not rows[2]["decision"]["urgent"]
    (folder / "golden.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert code_of(make_bundle, tmp_path / "bundle", tasks=(folder,)) == "export.golden_failed"


def test_task_longer_than_the_context_is_refused(make_bundle: Build, tmp_path: Path) -> None:
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "task.yaml").write_text(TASK.replace("max_prompt_tokens: 128", "max_prompt_tokens: 256"))
    assert code_of(make_bundle, tmp_path / "bundle", tasks=(folder,)) == "export.context_too_small"


def test_same_task_twice_is_refused(make_bundle: Build, task_folder: Path, tmp_path: Path) -> None:
    assert code_of(make_bundle, tmp_path / "bundle", tasks=(task_folder, task_folder)) == "export.task_repeated"


def test_figures_of_an_unknown_task_are_refused(make_bundle: Build, tmp_path: Path) -> None:
    measurement = Measurement(evaluate_on={"other": tmp_path / "x.jsonl"})
    assert code_of(make_bundle, tmp_path / "bundle", measurement=measurement) == "export.task_unknown"


@pytest.mark.parametrize("content", ["[]", "{", '{"sort": {"int4": {"accuracy": 0.9}}}', '{"sort": 1}'])
def test_figures_in_another_form_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "quality.json").write_text(content)
    with pytest.raises(EdgeError) as caught:
        read_quality(tmp_path / "quality.json")
    assert caught.value.code == "export.quality_invalid"


@pytest.mark.parametrize("line", ["{", '{"event": {"text": "x"}}', '{"event": {"text": []}, "decision": {}}', ""])
def test_labelled_event_that_cannot_be_read_is_named_by_line(line: str, make_bundle: Build, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(line + "\n")
    measurement = Measurement(evaluate_on={"sort": tmp_path / "data.jsonl"})
    assert code_of(make_bundle, tmp_path / "bundle", measurement=measurement) == "export.data_invalid"


def test_quality_and_calibration_enter_the_bundle(make_bundle: Build, task_folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (task_folder / "golden.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        row["decision"]["rank"] = row["decision"]["rank"] % 12 + 1
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 15))
    data = {"sort": tmp_path / "data.jsonl"}
    result: BuildResult = make_bundle(tmp_path / "bundle", measurement=Measurement(calibrate_on=data, evaluate_on=data))
    figures = result.manifest.quality["sort"]["int4"]
    assert figures["rows"] == 60
    assert figures["accuracy"] == {"kind": 1.0, "urgent": 1.0, "rank": 0.5}
    assert set(result.manifest.quality["sort"]) == {"fp32", "int4"}
    stored = json.loads((tmp_path / "bundle/tasks/sort/calibration.json").read_text())
    assert stored["format"] == 1
    assert set(stored["temperature"]) == {"kind", "urgent", "rank"}
    assert "tasks/sort/calibration.json" in [entry.path for entry in result.manifest.files]
    manifest, digest = read_manifest(tmp_path / "bundle")
    engine = Engine(open_installed_bundle(tmp_path / "bundle", digest), threads=1)
    oracle = GreedyDecoder(
        tmp_path / "bundle" / manifest.model.decoder, tmp_path / "bundle/tokenizer.json", manifest.model
    )
    decoded = oracle.decide(engine.tasks["sort"], EVENTS[0])
    answer = engine.decide("sort", EVENTS[0], deadline_s=30)
    assert answer.confidence == pytest.approx(decoded.confidence(stored["temperature"]), abs=0.05)


def asking(task_folder: Path, folder: Path, thresholds: str, rank_wrong_every: int = 2) -> Path:
    """The task with other thresholds and its golden examples, many times over, as labelled events."""
    folder.mkdir()
    task = (task_folder / "task.yaml").read_text()
    (folder / "task.yaml").write_text(task.replace("thresholds: {kind: 0.5}", f"thresholds: {thresholds}"))
    rows = [json.loads(line) for line in (task_folder / "golden.jsonl").read_text().splitlines()] * 20
    for index, row in enumerate(rows):
        if index % rank_wrong_every == 0:
            row["decision"]["rank"] = row["decision"]["rank"] % 12 + 1
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_floor_is_chosen_where_the_target_can_be_kept_and_told_impossible_where_not(
    make_bundle: Build, task_folder: Path, tmp_path: Path
) -> None:
    thresholds = "{kind: {max_wrong: 0.1}, urgent: 0.5, rank: {max_wrong: 0.05, certainty: 0.9, abstain: 0.2}}"
    folder = asking(task_folder, tmp_path / "asking", thresholds)
    others = tmp_path / "others.jsonl"
    others.write_text("".join((folder / "labelled.jsonl").read_text().splitlines(keepends=True)[:8]))
    measurement = Measurement(calibrate_on={"sort": folder / "labelled.jsonl"}, evaluate_on={"sort": others})
    result: BuildResult = make_bundle(tmp_path / "bundle", tasks=(folder,), measurement=measurement)
    stored = json.loads((tmp_path / "bundle/tasks/sort/calibration.json").read_text())
    assert stored["format"] == 1
    assert (stored["floors"]["kind"]["wrong"], stored["floors"]["kind"]["events"]) == (0, 40)
    assert stored["floors"]["kind"]["floor"] is not None
    assert stored["floors"]["rank"]["floor"] is None
    figures = result.manifest.quality["sort"]["int4"]["floors"]
    assert [figures[name]["verdict"] for name in ("kind", "urgent", "rank")] == ["kept", None, "nothing passes"]
    assert result.report["floors"]["sort"] == stored["floors"]

    _, digest = read_manifest(tmp_path / "bundle")
    answer = Engine(open_installed_bundle(tmp_path / "bundle", digest), threads=1).decide(
        "sort", EVENTS[0], deadline_s=30
    )
    assert answer.route == "abstained"
    assert "rank" in answer.unsure_fields
    assert "kind" not in answer.unsure_fields


def test_a_task_without_a_target_does_not_wait_for_the_floors_of_its_neighbour(
    make_bundle: Build, task_folder: Path, tmp_path: Path
) -> None:
    first = asking(task_folder, tmp_path / "first", "{kind: {max_wrong: 0.1}}")
    second = asking(task_folder, tmp_path / "second", "{urgent: {max_wrong: 0.1}}")
    third = asking(task_folder, tmp_path / "third", "{kind: 0.5}")
    for name, folder in (("twin", second), ("plain", third)):
        (folder / "task.yaml").write_text((folder / "task.yaml").read_text().replace("name: sort", f"name: {name}"))
    data = {"sort": first / "labelled.jsonl", "twin": second / "labelled.jsonl"}
    make_bundle(tmp_path / "bundle", tasks=(first, second, third), measurement=Measurement(calibrate_on=data))
    stored = {
        name: json.loads((tmp_path / f"bundle/tasks/{name}/calibration.json").read_text()) for name in ("sort", "twin")
    }
    assert stored["sort"]["floors"]["kind"]["wrong"] == stored["twin"]["floors"]["urgent"]["wrong"] == 0
    assert not (tmp_path / "bundle/tasks/plain/calibration.json").exists()


def test_target_without_labelled_events_is_refused_even_with_a_calibration_from_elsewhere(
    make_bundle: Build, task_folder: Path, tmp_path: Path
) -> None:
    folder = asking(task_folder, tmp_path / "asking", "{kind: {max_wrong: 0.1}}")
    floor = {"max_wrong": 0.1, "certainty": 0.95, "floor": 0.1, "events": 9, "passed": 9, "wrong": 0}
    (folder / "calibration.json").write_text(json.dumps({"format": 1, "floors": {"kind": floor}}))
    assert code_of(make_bundle, tmp_path / "bundle", tasks=(folder,)) == "export.target_unlabelled"


def test_floors_are_not_measured_on_the_events_that_they_were_chosen_on(
    make_bundle: Build, task_folder: Path, tmp_path: Path
) -> None:
    folder = asking(task_folder, tmp_path / "asking", "{kind: {max_wrong: 0.1}}")
    (tmp_path / "same.jsonl").write_bytes((folder / "labelled.jsonl").read_bytes())
    measurement = Measurement({"sort": folder / "labelled.jsonl"}, {"sort": tmp_path / "same.jsonl"})
    assert code_of(make_bundle, tmp_path / "bundle", tasks=(folder,), measurement=measurement) == "export.data_repeated"


def test_killed_build_leaves_nothing_that_looks_whole(llama: Path, task_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "bundle"
    command = [
        sys.executable,
        "-m",
        "export",
        "build",
        str(llama),
        "--target",
        "cpu-x86_64",
        "--task",
        str(task_folder),
    ]
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "config")}
    process = subprocess.Popen(
        [*command, "--out", str(out), "--name", "tiny"], cwd=ROOT, env=environment, stderr=subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(b"int4-"):  # the graph is written, the manifest is not
                break
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert not out.exists()
    assert not list(tmp_path.glob("out/*/manifest.json"))


def test_block_size_outside_the_list_is_refused() -> None:
    with pytest.raises(EdgeError) as caught:
        QuantSettings("rtn", 48)
    assert caught.value.code == "export.block_size"


def test_developer_key_is_made_once_and_trusted(int4_bundle: Path, tmp_path: Path) -> None:
    script = "from export.signing import load_signing_key as f; f(None); f(None)"
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, check=True, text=True
    )
    private = tmp_path / "edge-agent/keys/developer.pem"
    assert run.stderr.count("created signing key") == 1
    assert private.stat().st_mode & 0o777 == 0o600
    public = load_public_key((tmp_path / "edge-agent/trusted/developer.pem").read_bytes())
    assert load_private_key(private.read_bytes()).public_key() == public


def test_damaged_bundle_is_not_signed(make_bundle: Build, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    (tmp_path / "bundle/tokenizer.json").write_bytes(b"{}")
    with pytest.raises(EdgeError) as caught:
        sign_bundle(tmp_path / "bundle", load_signing_key(_key(tmp_path)))
    assert caught.value.code == "bundle.file_truncated"


def test_signature_opens_with_its_key_only(make_bundle: Build, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    key = load_signing_key(_key(tmp_path))
    digest = sign_bundle(tmp_path / "bundle", key)
    assert open_signed_bundle(tmp_path / "bundle", [key.public_key()]).digest == digest
    envelope = (tmp_path / "bundle/manifest.sig.json").read_bytes()
    other = load_signing_key(_key(tmp_path, "other.pem"))
    with pytest.raises(EdgeError) as caught:
        open_envelope(envelope, MANIFEST_TYPE, [other.public_key()])
    assert caught.value.code == "signature.untrusted"


def _key(folder: Path, name: str = "key.pem") -> Path:
    from edge_agent.contract.dsse import generate_key, private_key_to_pem

    (folder / name).write_bytes(private_key_to_pem(generate_key()))
    return folder / name
