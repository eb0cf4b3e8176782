"""What is measured: checkpoints, the bundles that the exporter makes of them, the peers' files of the same weights."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from edge_agent.contract.dsse import generate_key, load_private_key, private_key_to_pem, public_key_to_pem
from edge_agent.contract.manifest import Manifest, read_manifest
from tests.bench.cache import CACHE, ROOT, cached, files_digest, versions_of
from tests.bench.measured_run import Run, run_measured

HERE = Path(__file__).parent
REFERENCE = ROOT / "export" / "reference"
HELDOUT = REFERENCE / "data" / "heldout.jsonl"
GGUF_NAME = "model-q4_0.gguf"
PRINTED = "printed.json"
TARGET = "cpu-x86_64"
_BYTES_OF_AN_ID = 4
_STAGE_LINE = re.compile(r"^\[(\w+)\] ([\d.]+) s$", re.MULTILINE)


@dataclass(frozen=True)
class Built:
    """A bundle and what making it took."""

    bundle: Path
    run: Run

    @property
    def graph_bytes(self) -> int:
        """The files of the model: graphs, weights beside them, head ids."""
        return graph_bytes(self.bundle)

    @property
    def head_rows(self) -> int | None:
        """Rows of a pruned head, None for a whole one."""
        manifest, _ = read_manifest(self.bundle)
        sizes = {entry.path: entry.size for entry in manifest.files}
        return None if manifest.model.head_ids is None else sizes[manifest.model.head_ids] // _BYTES_OF_AN_ID

    @property
    def stages(self) -> str:
        """What each stage took, as the build told it: ``source 1.2 s, fuse 14.0 s``."""
        return ", ".join(f"{stage} {seconds} s" for stage, seconds in _STAGE_LINE.findall(self.run.stderr))


@dataclass(frozen=True)
class GgufPeer:
    """llama.cpp's file.

    Args:
        path: the file.
        file_bytes: all of it.
        tensor_bytes: its weights alone.
        default_mix_bytes: the whole file as ``llama-quantize`` makes it without ``--pure``.
    """

    path: Path
    file_bytes: int
    tensor_bytes: int
    default_mix_bytes: int


def graph_bytes(bundle: Path) -> int:
    """Bytes of everything under ``model/`` of a bundle."""
    manifest: Manifest = read_manifest(bundle)[0]
    return sum(entry.size for entry in manifest.files if entry.path.startswith("model/"))


def python_module(module: str, *arguments: str | Path) -> list[str | Path]:
    """A command line of this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def synthetic_checkpoint(shape: str) -> Path:
    """Random weights in a published shape, as ``edge-export synth`` makes them."""
    key = {
        "shape": shape,
        "synth": files_digest(ROOT / "export" / "checkpoint" / "synth.py"),
        "versions": versions_of("torch", "transformers", "tokenizers", "safetensors"),
    }

    def make(folder: Path) -> None:
        run_measured(python_module("export", "synth", "--like", shape, folder), cwd=ROOT)

    return cached(f"checkpoint-{shape}", key, make)


def task_without_golden() -> Path:
    """The reference task; its golden examples are answers of the reference model and of no other."""
    source = REFERENCE / "task" / "task.yaml"

    def make(folder: Path) -> None:
        shutil.copyfile(source, folder / source.name)

    return cached("task", {"task": files_digest(source)}, make)


def vocabulary_text(shape: str, checkpoint: Path) -> Path:
    """Text that reaches more tokens of a random vocabulary than a pruned head has rows: every token, a line each.

    The domain's own text reaches some 1,600 tokens of it, and a head of 1,600 rows is not what is to be weighed.
    """
    source = checkpoint / "tokenizer.json"

    def make(folder: Path) -> None:
        tokenizer = Tokenizer.from_file(str(source))
        lines = (tokenizer.decode([token], skip_special_tokens=False) for token in range(tokenizer.get_vocab_size()))
        (folder / "vocabulary.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8")

    return cached(f"vocabulary-{shape}", {"tokenizer": files_digest(source)}, make) / "vocabulary.txt"


def build_bundle(checkpoint: Path, name: str, arguments: Sequence[str | Path] = (), task: Path | None = None) -> Built:
    """Run ``edge-export build`` from nothing, in a process of its own: time is a figure, so no stage is reused.

    Args:
        checkpoint: Hugging Face folder.
        name: of the bundle's folder below ``build/bench``.
        arguments: further ones of the command.
        task: folder of the task; default: the reference task.

    Raises:
        CommandFailedError: the build refused or failed.
    """
    out, work = CACHE / "bundles" / name, CACHE / "work"
    for stale in (out, work):
        shutil.rmtree(stale, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    command = python_module("export", "build", checkpoint, "--target", TARGET, "--task", task or task_without_golden())
    command += ["--out", out, "--name", "bench", "--sign-key", _signing_key(), *arguments]
    run = run_measured([*command, "--work", work], cwd=ROOT)
    shutil.rmtree(work)
    return Built(out, run)


def gguf_peer(name: str, checkpoint: Path) -> GgufPeer:
    """The checkpoint as Q4_0 GGUF."""
    key = {
        "checkpoint": files_digest(checkpoint),
        "writer": files_digest(HERE / "gguf_peer.py"),
        "versions": versions_of("gguf"),
    }

    def make(folder: Path) -> None:
        written = run_measured(python_module("tests.bench.gguf_peer", checkpoint, folder / GGUF_NAME), cwd=ROOT)
        (folder / PRINTED).write_text(written.stdout, "utf-8")

    folder = cached(f"gguf-{name}", key, make)
    return GgufPeer(folder / GGUF_NAME, **json.loads((folder / PRINTED).read_text("utf-8")))


def llama_cpp_sizes(name: str, checkpoint: Path, python: Path) -> dict[str, int]:
    """What llama.cpp's own quantiser makes of the checkpoint: bytes of the file, ``pure`` and ``default_mix``.

    Args:
        name: of the cached folder.
        checkpoint: Hugging Face folder.
        python: interpreter of the environment of `tests.bench.llama_cpp_peer`.
    """
    programs = files_digest(HERE / "gguf_peer.py", HERE / "llama_cpp_sizes.py")
    key = {"checkpoint": files_digest(checkpoint), "programs": programs, "python": str(python)}

    def make(folder: Path) -> None:
        source, scratch = folder / "f16.gguf", folder / "scratch.gguf"
        run_measured(python_module("tests.bench.gguf_peer", checkpoint, source, "--type", "f16"), cwd=ROOT)
        printed = run_measured([python, HERE / "llama_cpp_sizes.py", source, scratch], cwd=ROOT).stdout
        source.unlink()
        (folder / PRINTED).write_text(printed, "utf-8")

    found: dict[str, int] = json.loads((cached(f"llama-sizes-{name}", key, make) / PRINTED).read_text("utf-8"))
    return found


def optimum_peer(name: str, checkpoint: Path) -> Path:
    """The checkpoint as optimum's graph with MatMulNBits: the folder of ``model.onnx`` and its weights."""
    key = {
        "checkpoint": files_digest(checkpoint),
        "writer": files_digest(HERE / "optimum_peer.py"),
        "versions": versions_of("optimum", "optimum-onnx", "onnxruntime", "torch", "transformers"),
    }

    def make(folder: Path) -> None:
        run_measured(python_module("tests.bench.optimum_peer", checkpoint, folder), cwd=ROOT)

    return cached(f"optimum-{name}", key, make)


def signer_pem() -> bytes:
    """Public half of the key that signs a benchmark's bundles, PEM."""
    return public_key_to_pem(load_private_key(_signing_key().read_bytes()).public_key())


def _signing_key() -> Path:
    # Not the developer's own: a benchmark's bundles are nothing that anybody should trust.
    path = CACHE / "signing.pem"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(private_key_to_pem(generate_key()))
    return path
