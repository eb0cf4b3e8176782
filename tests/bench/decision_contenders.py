"""Of one model: our bundle, and each peer's program with its file of the same weights, for whole decisions."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from edge_agent.contract.task import TaskSpec
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
        ours: our bundle.
        llama: llama.cpp's server.
        ogenai: onnxruntime-genai.
    """

    name: str
    checkpoint: Path
    task: TaskSpec
    ours: OurBundle | Missing
    llama: LlamaServer | Missing
    ogenai: Ogenai | Missing


def make_decision_contenders(name: str, shape: str | None, say: Say) -> DecisionContenders:
    """Make everything, or find it in the cache.

    Args:
        name: of the model.
        shape: as `export.checkpoint.synth` names it; None: the trained reference model with its own task.
        say: is told what happens.
    """
    if shape is None:
        checkpoint, folder = REFERENCE / "checkpoint", REFERENCE / "task"
        ours: OurBundle | Missing = OurBundle(REFERENCE / "bundle", None)
    else:
        say(f"{name}: checkpoint")
        checkpoint, folder = synthetic_checkpoint(shape), decision_task()
        say(f"{name}: bundle")
        ours = attempt(lambda: decision_bundle(shape, checkpoint, folder), say)
    say(f"{name}: llama-server (compiled once, some minutes)")
    llama = attempt(lambda: LlamaServer(llama_server(), gguf_peer(shape or name, checkpoint).path), say)
    say(f"{name}: onnxruntime-genai")
    ogenai = attempt(lambda: _ogenai(shape or name, checkpoint), say)
    return DecisionContenders(name, checkpoint, load_decision_task(folder), ours, llama, ogenai)


def decision_bundle(shape: str, checkpoint: Path, task: Path) -> OurBundle:
    """Our bundle with a head of `HEAD_ROWS` rows and the exporter's defaults besides.

    Kept, unlike those whose making is measured: here only its answers count.
    """
    key = {
        "checkpoint": files_digest(checkpoint),
        "task": files_digest(task),
        "exporter": files_digest(*sorted((ROOT / "export").rglob("*.py"))),
        "rows": HEAD_ROWS,
        "versions": versions_of("onnx", "onnxruntime", "torch", "mobius-onnx"),
    }

    def make(folder: Path) -> None:
        rows: list[str | Path] = [
            "--vocab-from",
            HELDOUT,
            vocabulary_text(shape, checkpoint),
            "--vocab-rows",
            str(HEAD_ROWS),
        ]
        built = build_bundle(checkpoint, f"{shape}-decisions", rows, task)
        shutil.move(built.bundle, folder / BUNDLE)
        (folder / SIGNER).write_bytes(signer_pem())

    folder = cached(f"decision-bundle-{shape}", key, make)
    return OurBundle(folder / BUNDLE, folder / SIGNER)


def _ogenai(name: str, checkpoint: Path) -> Ogenai:
    python = ogenai_python()
    return Ogenai(python, ogenai_model(name, checkpoint, python))
