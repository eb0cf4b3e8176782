"""onnxruntime-genai in an environment of its own, and a checkpoint as its own model builder makes it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from tests.bench.cache import ROOT, cached, files_digest, versions_of
from tests.bench.measured_run import run_measured

PACKAGE = "onnxruntime-genai==0.18.0"
BUILDER_NEEDS = ("transformers==5.24.0", "onnx", "onnx-ir", "safetensors", "tqdm")
"""Its builder asks for newer transformers than the exporter's, which is one more reason for the walls between them."""
EXTRA_OPTIONS = ("prune_lm_head=true", "hf_token=false")
"""Logits of the last token alone, as we compute them. Blocks of 32, symmetric, accuracy level 4 and a shared table are
what the builder takes by itself."""
PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
"""Instead of one that its tokenizer library cannot read; prompts that it spells otherwise are then given as tokens."""
GUIDANCE_MARK = "\u0102"
"""How byte-level BPE spells ``\\x02``. Its guidance puts that before the bytes that the grammar forces, and cuts it off
again as one token. Its tokenizer looks a whole word up before it merges: where ``\\x02:`` is a token, as in a large
synthetic vocabulary, a forced colon is cut off too, and the mask then allows what the grammar does not."""
TELEMETRY_OFF = {"ORT_DISABLE_TELEMETRY": "1"}
_TOKENIZER_CONFIG = "tokenizer_config.json"


def ogenai_python() -> Path:
    """The interpreter of an environment that holds onnxruntime-genai and what its builder needs.

    Raises:
        subprocess.CalledProcessError: no way to the packages; its ``stderr`` says which.
    """
    key = {"packages": (PACKAGE, *BUILDER_NEEDS), "python": platform.python_version(), "prefix": sys.prefix}
    return cached("ogenai", key, _install) / "bin" / "python"


def _install(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True, text=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "numpy", PACKAGE, *BUILDER_NEEDS], check=True, capture_output=True, text=True)
    # torch weighs more than all the rest and is the same for both: found in the exporter's environment, looked up last.
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "torch_of_the_exporter.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")


def ogenai_model(name: str, checkpoint: Path, python: Path) -> Path:
    """The checkpoint as onnxruntime-genai's builder makes it: INT4 for the CPU.

    Args:
        name: of the cached folder.
        checkpoint: Hugging Face folder.
        python: as `ogenai_python` found it.

    Raises:
        CommandFailedError: the builder refused.
    """
    key = {
        "checkpoint": files_digest(checkpoint),
        "packages": (PACKAGE, *BUILDER_NEEDS),
        "options": EXTRA_OPTIONS,
        "pre_tokenizer": PRE_TOKENIZER,
        "guidance_mark": GUIDANCE_MARK,
        "versions": versions_of("torch"),
    }

    def make(folder: Path) -> None:
        source, model = folder / "checkpoint", folder / "model"
        shutil.copytree(checkpoint, source)
        _make_readable(source / "tokenizer.json")
        if not (source / _TOKENIZER_CONFIG).is_file():
            (source / _TOKENIZER_CONFIG).write_text(json.dumps(_tokenizer_config(source)), "utf-8")
        command: list[str | Path] = [python, "-m", "onnxruntime_genai.models.builder", "-m", name, "-i", source]
        command += ["-o", model, "-p", "int4", "-e", "cpu", "-c", folder / "scratch"]
        # `env` because the wheel reports usage over the network by default.
        telemetry_off = [f"{variable}={value}" for variable, value in TELEMETRY_OFF.items()]
        run_measured(["env", *telemetry_off, *command, "--extra_options", *EXTRA_OPTIONS], cwd=ROOT)
        shutil.rmtree(source)
        shutil.rmtree(folder / "scratch", ignore_errors=True)

    return cached(f"ogenai-model-{name}", key, make) / "model"


def _make_readable(tokenizer: Path) -> None:
    spec = json.loads(tokenizer.read_text("utf-8"))
    if spec["pre_tokenizer"]["type"] != PRE_TOKENIZER["type"]:
        spec["pre_tokenizer"] = PRE_TOKENIZER
    _part_guidance_mark(spec["model"])
    tokenizer.write_text(json.dumps(spec, ensure_ascii=False), "utf-8")


def _part_guidance_mark(bpe: dict[str, Any]) -> None:
    """No token begins with `GUIDANCE_MARK` and goes on; ids stay, and so does the spelling of every text without it."""
    bpe["merges"] = [pair for pair in bpe["merges"] if not pair[0].startswith(GUIDANCE_MARK)]
    bpe["vocab"] = {
        # Doubled: a name of its own that no forced text has.
        GUIDANCE_MARK + token if token.startswith(GUIDANCE_MARK) and token != GUIDANCE_MARK else token: number
        for token, number in bpe["vocab"].items()
    }


def _tokenizer_config(checkpoint: Path) -> dict[str, object]:
    """What the builder wants beside ``tokenizer.json``; a synthetic checkpoint has none."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))
    named = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "add_bos_token": False,
        "eos_token": named[config["eos_token_id"]],
        "pad_token": named[config["pad_token_id"]],
        "clean_up_tokenization_spaces": False,
    }


def environment() -> dict[str, str]:
    """Of a process that runs the peer."""
    return {**os.environ, **TELEMETRY_OFF}
