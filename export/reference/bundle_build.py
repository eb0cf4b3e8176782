"""The second half of ``make reference``: from the committed checkpoint to the committed bundle.

    python -m export.reference.bundle_build             # bundle from checkpoint, task and figures as committed
    python -m export.reference.bundle_build --measure   # choose golden examples, calibrate and measure anew, then build
    python -m export.reference.bundle_build --compare   # print the table of methods and block sizes, build nothing

Everything that is measured (golden examples, temperatures, accuracy) is a committed file and an input of the build, so
the bundle's bytes depend on files alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.contract.document import to_document
from edge_agent.contract.dsse import generate_key, load_public_key
from edge_agent.contract.manifest import MANIFEST_NAME, SIGNATURE_NAME, read_manifest
from edge_agent.contract.task import GoldenExample, TaskSpec, load_task
from edge_agent.errors import EdgeError
from edge_agent.fs import write_atomic
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.signed_bundle import open_signed_bundle
from export.boards import Precision
from export.build import Workplace, build
from export.progress import LineProgress
from export.proof.calibrate import CALIBRATION_NAME, calibration_bytes, fit_temperatures
from export.proof.evaluate import Quality, evaluate, read_labelled
from export.proof.greedy import GreedyDecoder
from export.proof.measure import DEADLINE_S, THREADS, bundle_backend, read_calibration
from export.quantisation.quantize import BLOCK_SIZES, CALIBRATED_METHODS, METHODS, QuantSettings
from export.reference.generator import generate
from export.request import BuildRequest, Identity, Measurement, read_quality
from export.signing import load_signing_key
from export.tasks import GOLDEN_NAME, TASK_NAME

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint"
TASK_FOLDER = HERE / "task"
HELDOUT = HERE / "data" / "heldout.jsonl"
QUALITY = HERE / "quality.json"
BUNDLE = HERE / "bundle"
PUBLIC_KEY = HERE.parents[1] / "edge_agent" / "keys" / "reference.pub.pem"

IDENTITY = Identity(name="triage-reference", version="1.0.0", target="cpu-x86_64")
QUANTISATION = QuantSettings("rtn", 32)
CALIBRATION_EVENTS = 1000
CALIBRATION_SEED = 7
GPTQ_EVENTS = 128
GOLDEN_COUNT = 24
GOLDEN_CONFIDENCE = 0.9
"""Every field of a golden example is at least this sure: other kernels' rounding must not turn the answer."""


def reference_request(
    precision: Precision = "int4",
    quantisation: QuantSettings = QUANTISATION,
    tasks: tuple[Path, ...] = (TASK_FOLDER,),
    quality: dict[str, Any] | None = None,
    checkpoint: Path = CHECKPOINT,
) -> BuildRequest:
    """What the committed bundle is built from; other arguments serve comparisons."""
    return BuildRequest(
        checkpoint=checkpoint,
        tasks=tasks,
        identity=IDENTITY,
        precision=precision,
        quantisation=quantisation,
        measurement=Measurement(quality=read_quality(QUALITY) if quality is None else quality),
    )


def main(argv: list[str] | None = None) -> int:
    """Command line (see the module's docstring)."""
    parser = argparse.ArgumentParser(prog="python -m export.reference.bundle_build", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="choose golden examples, calibrate and measure anew")
    parser.add_argument("--compare", action="store_true", help="print accuracy and size of every method, build nothing")
    parser.add_argument("--only", nargs="*", default=(), metavar="PRECISION", help="rows of --compare, such as fp32")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, metavar="DIR", help="with --compare only")
    parser.add_argument(
        "--sign-key", type=Path, metavar="FILE", help="private half of edge_agent/keys/reference.pub.pem"
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.compare:
            _compare(arguments.checkpoint, arguments.only)
            return 0
        if arguments.measure:
            _measure()
        _build_and_sign(arguments.sign_key)
    except EdgeError as error:
        _log(str(error))
        return 1
    return 0


def _build_and_sign(key_file: Path | None) -> None:
    signature = (BUNDLE / SIGNATURE_NAME).read_bytes() if (BUNDLE / SIGNATURE_NAME).is_file() else None
    before = read_manifest(BUNDLE)[1] if (BUNDLE / MANIFEST_NAME).is_file() else None
    key = load_signing_key(key_file) if key_file else generate_key()
    result = build(reference_request(), BUNDLE, key, Workplace(LineProgress(), force=True))
    if key_file is None and result.digest == before and signature is not None:
        # Nothing has changed, so the signature that was there still holds.
        write_atomic(BUNDLE / SIGNATURE_NAME, signature, mode=0o644)
    elif key_file is None:
        _sign_as_developer(load_signing_key(None))
    _say(f"{BUNDLE}  sha256:{result.digest}")
    try:
        open_signed_bundle(BUNDLE, [load_public_key(PUBLIC_KEY.read_bytes())])
    except EdgeError:
        _log("not signed by the reference key: commit your own public key as edge_agent/keys/reference.pub.pem")


def _sign_as_developer(key: Ed25519PrivateKey) -> None:
    from export.signing import sign_bundle

    sign_bundle(BUNDLE, key)


def _measure() -> None:
    """Write golden.jsonl, calibration.json and quality.json."""
    for name in (GOLDEN_NAME, CALIBRATION_NAME):
        (TASK_FOLDER / name).unlink(missing_ok=True)
    task = load_task(TASK_FOLDER / TASK_NAME)
    heldout = read_labelled(HELDOUT, task)
    calibration = [
        GoldenExample(event=row.event, decision=dict(row.decision))
        for row in islice(generate("validation", CALIBRATION_SEED), CALIBRATION_EVENTS)
    ]
    quality: dict[str, Any] = {}
    with built(reference_request(quality={})) as bundle:
        model = read_manifest(bundle)[0].model
        decoder = GreedyDecoder(bundle / model.decoder, bundle / model.tokenizer, model, THREADS)
        temperatures = fit_temperatures(decoder, task, calibration)
        write_atomic(TASK_FOLDER / CALIBRATION_NAME, calibration_bytes(temperatures), mode=0o644)
        _log(f"temperatures {temperatures} from {len(calibration)} validation events")
    for precision in ("fp32", "int4"):
        with built(reference_request(precision=precision, quality={})) as bundle:
            quality[precision] = quality_of(bundle, task, heldout).as_dict()
            _log(f"{precision}: {quality[precision]}")
            if precision == "int4":
                examples = choose_golden(bundle, task, heldout)
                lines = [json.dumps(to_document(e), ensure_ascii=False) + "\n" for e in examples]
                write_atomic(TASK_FOLDER / GOLDEN_NAME, "".join(lines).encode(), mode=0o644)
                _log(f"{len(examples)} golden examples")
    write_atomic(QUALITY, (json.dumps({task.name: quality}, indent=2) + "\n").encode(), mode=0o644)


def choose_golden(bundle: Path, task: TaskSpec, rows: list[GoldenExample]) -> list[GoldenExample]:
    """Examples that the model answers right and surely, spread over category and severity, short and long texts.

    Args:
        bundle: the INT4 bundle, calibrated.
        task: its task.
        rows: labelled events that the model was not trained on.

    Returns:
        At most `GOLDEN_COUNT` examples in the order of ``rows``.
    """
    _, digest = read_manifest(bundle)
    engine = Engine(open_installed_bundle(bundle, digest), THREADS)
    sure: list[tuple[float, int]] = []
    for index, row in enumerate(rows):
        answer = engine.decide(task.name, dict(row.event), deadline_s=DEADLINE_S)
        margin = min(answer.confidence.values())
        if answer.decision == row.decision and margin >= GOLDEN_CONFIDENCE:
            sure.append((margin, index))
    chosen: list[int] = []
    seen: dict[tuple[str, Any], int] = {}
    while len(chosen) < GOLDEN_COUNT and len(chosen) < len(sure):
        # The least represented kind first, then the surest: a greedy cover of what can go wrong.
        left = [(margin, index) for margin, index in sure if index not in chosen]
        _, best = max(left, key=lambda item: (-sum(seen.get(kind, 0) for kind in _kinds(rows[item[1]])), item))
        chosen.append(best)
        for kind in _kinds(rows[best]):
            seen[kind] = seen.get(kind, 0) + 1
    return [rows[index] for index in sorted(chosen)]


def _kinds(row: GoldenExample) -> list[tuple[str, Any]]:
    length = len(str(row.event.get("text") or ""))
    size = "none" if length == 0 else "short" if length < 40 else "long" if length > 90 else "middle"
    return [("category", row.decision["category"]), ("severity", row.decision["severity"]), ("length", size)]


def quality_of(bundle: Path, task: TaskSpec, rows: list[GoldenExample]) -> Quality:
    """Accuracy of a bundle with the device's engine."""
    with bundle_backend(bundle, task) as decide:
        return evaluate(decide, rows, task, read_calibration(bundle, task).floors)


@contextmanager
def built(request: BuildRequest) -> Iterator[Path]:
    """A bundle in a temporary directory, signed by nobody in particular."""
    with tempfile.TemporaryDirectory() as folder:
        build(request, Path(folder) / "bundle", generate_key(), Workplace(LineProgress()))
        yield Path(folder) / "bundle"


def _compare(checkpoint: Path, wanted: Sequence[str]) -> None:
    """Print accuracy on the held-out events and size: every method, block size and symmetry."""
    task = load_task(TASK_FOLDER / TASK_NAME)
    rows = read_labelled(HELDOUT, task)
    fields = [field.name for field in task.output_fields]
    _say(f"| precision | bundle bytes | {' | '.join(fields)} | every field |")
    _say("|---|---|" + "---|" * (len(fields) + 1))
    with tempfile.TemporaryDirectory() as folder:
        # Without golden examples: a method that fails one is compared all the same.
        (Path(folder) / TASK_NAME).write_bytes((TASK_FOLDER / TASK_NAME).read_bytes())
        texts = Path(folder) / "calibration.jsonl"
        events = islice(generate("validation", CALIBRATION_SEED), GPTQ_EVENTS)
        texts.write_text(
            "".join(json.dumps({"event": e.event, "decision": e.decision}) + "\n" for e in events), "utf-8"
        )
        for precision, quantisation in _precisions():
            label = quantisation.label if precision == "int4" else precision
            if wanted and label not in wanted:
                continue
            request = reference_request(precision, quantisation, (Path(folder),), {}, checkpoint)
            if precision == "int4" and quantisation.needs_texts:
                request = replace(request, measurement=Measurement(calibrate_on={task.name: texts}))
            try:
                with built(request) as bundle:
                    manifest, _ = read_manifest(bundle)
                    found = quality_of(bundle, task, rows)
            except EdgeError as error:
                _say(f"| {label} | not possible: {error.detail} |")
                continue
            cells = " | ".join(f"{found.accuracy[name]:.1%}" for name in fields)
            _say(f"| {manifest.model.precision} | {manifest.size_bytes:,} | {cells} | {found.exact:.1%} |")


def _precisions() -> Iterator[tuple[Precision, QuantSettings]]:
    yield "fp32", QUANTISATION
    yield "int8", QUANTISATION
    for method, block_size in product((*METHODS, *CALIBRATED_METHODS), BLOCK_SIZES):
        yield "int4", QuantSettings(method, block_size)
        if method != "hqq":
            usual = QuantSettings(method).is_symmetric
            yield "int4", QuantSettings(method, block_size, symmetric=not usual)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _log(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
