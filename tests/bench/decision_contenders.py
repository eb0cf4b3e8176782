"""Of one model: our bundle, and each peer's program with its file of the same weights, for whole decisions."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_agent.contract.task import TaskSpec
from edge_agent.runtime.bundle import VerifiedBundle
from edge_agent.runtime.signed_bundle import load_trusted_keys, open_signed_bundle
from tests.bench.attempts import Missing, Say, attempt
from tests.bench.cache import ROOT, cached, files_digest, versions_of
from tests.bench.decision_task import decision_task, load_decision_task
from tests.bench.llama_server_peer import llama_server
from tests.bench.made import (
    HELDOUT,
    REFERENCE,
    build_bundle,
    gguf_peer,
    signer_pem,
    synthetic_checkpoint,
    vocabulary_text,
)
from tests.bench.ogenai_peer import ogenai_model, ogenai_python

HEAD_ROWS = 8192
SCALE_EVENTS = 16
BUNDLE, SIGNER = "bundle", "signer.pub.pem"


@dataclass(frozen=True)
class OurBundle:
    """A bundle and who signed it.

    Args:
        path: its folder.
        signer: PEM of the signer's public key; None: a key that the device trusts by itself.
    """

    path: Path
    signer: Path | None

    def verified(self) -> VerifiedBundle:
        """Its signature checked and every file hashed."""
        return open_signed_bundle(self.path, load_trusted_keys([self.signer] if self.signer else []))


@dataclass(frozen=True)
class LlamaServer:
    """llama.cpp's side: ``binary`` answers with ``gguf``."""

    binary: Path
    gguf: Path


@dataclass(frozen=True)
class Ogenai:
    """onnxruntime-genai's side: ``python`` answers with the folder ``model``."""

    python: Path
    model: Path


@dataclass(frozen=True)
class DecisionContenders:
    """Everything that decides.

    Args:
        name: of the model, as keys of figures begin.
        checkpoint: Hugging Face folder that all were made of.
        task: what is decided.
        ours: our bundle, its projections in eight bits by rows.
        ours_int4: the same in four bits.
        llama: llama.cpp's server.
        ogenai: onnxruntime-genai.
    """

    name: str
    checkpoint: Path
    task: TaskSpec
    ours: OurBundle | Missing
    ours_int4: OurBundle | Missing
    llama: LlamaServer | Missing
    ogenai: Ogenai | Missing


def make_decision_contenders(name: str, shape: str | None, say: Say) -> DecisionContenders:
    """Make everything, or find it in the cache.

    Args:
        name: of the model.
        shape: as `export.checkpoint.synth` names it; None: the trained reference model with its own task.
        say: is told what happens.
    """
    checkpoint, folder, ours_int4, ours = make_own_bundles(name, shape, say)
    say(f"{name}: llama-server (compiled once, some minutes)")
    llama = attempt(lambda: LlamaServer(llama_server(), gguf_peer(shape or name, checkpoint).path), say)
    say(f"{name}: onnxruntime-genai")
    ogenai = attempt(lambda: _ogenai(shape or name, checkpoint), say)
    return DecisionContenders(name, checkpoint, load_decision_task(folder), ours, ours_int4, llama, ogenai)


def make_own_bundles(
    name: str, shape: str | None, say: Say
) -> tuple[Path, Path, OurBundle | Missing, OurBundle | Missing]:
    """Checkpoint, task folder, and our bundles of them in four and in eight bits (as `make_decision_contenders`)."""
    if shape is None:
        checkpoint, folder = REFERENCE / "checkpoint", REFERENCE / "task"
        ours_int4: OurBundle | Missing = OurBundle(REFERENCE / "bundle", None)
    else:
        say(f"{name}: checkpoint")
        checkpoint, folder = synthetic_checkpoint(shape), decision_task()
        say(f"{name}: bundle in four bits")
        ours_int4 = attempt(lambda: decision_bundle(shape, checkpoint, folder, "int4", head_of(shape, checkpoint)), say)
    say(f"{name}: bundle in eight bits")
    head = [] if shape is None else head_of(shape, checkpoint)
    ours = attempt(lambda: decision_bundle(shape or name, checkpoint, folder, "int8", head), say)
    return checkpoint, folder, ours_int4, ours


def bundle_for_tokens(shape: str, checkpoint: Path) -> OurBundle:
    """Ours in the form for texts that are written token by token: of weights and caches, a token reads the least."""
    options = [*head_of(shape, checkpoint), "--block-size", "128", "--kv", "int8", "--calibrate-on", _few_events()]
    return decision_bundle(f"{shape}-tokens", checkpoint, decision_task(), "int4", options)


def _few_events() -> Path:
    """On which scales of int8 caches are measured."""

    def make(folder: Path) -> None:
        lines = HELDOUT.read_text("utf-8").splitlines(keepends=True)
        (folder / HELDOUT.name).write_text("".join(lines[:SCALE_EVENTS]), "utf-8")

    return cached("few-events", {"events": files_digest(HELDOUT), "count": SCALE_EVENTS}, make) / HELDOUT.name


def head_of(shape: str, checkpoint: Path) -> list[str | Path]:
    """Arguments of a build whose head keeps `HEAD_ROWS` rows: those of the events, and then any."""
    return ["--vocab-from", HELDOUT, vocabulary_text(shape, checkpoint), "--vocab-rows", str(HEAD_ROWS)]


def decision_bundle(
    name: str, checkpoint: Path, task: Path, precision: str, arguments: Sequence[str | Path]
) -> OurBundle:
    """Our bundle with the exporter's defaults but for its precision and head.

    Kept, unlike those whose making is measured: here only its answers count.

    Args:
        name: of the model.
        checkpoint: Hugging Face folder.
        task: folder of the task.
        precision: of the projections.
        arguments: further ones of the build.
    """
    key = {
        "checkpoint": files_digest(checkpoint),
        "task": files_digest(task),
        "exporter": files_digest(*sorted((ROOT / "export").rglob("*.py"))),
        "arguments": [str(argument) for argument in arguments],
        "versions": versions_of("onnx", "onnxruntime", "torch", "mobius-onnx"),
    }

    def make(folder: Path) -> None:
        built = build_bundle(checkpoint, f"{name}-{precision}", ["--precision", precision, *arguments], task)
        shutil.move(built.bundle, folder / BUNDLE)
        (folder / SIGNER).write_bytes(signer_pem())

    folder = cached(f"decision-bundle-{name}-{precision}", key, make)
    return OurBundle(folder / BUNDLE, folder / SIGNER)


def _ogenai(name: str, checkpoint: Path) -> Ogenai:
    python = ogenai_python()
    return Ogenai(python, ogenai_model(name, checkpoint, python))
