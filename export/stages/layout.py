"""Names of what the stages leave for each other."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from edge_agent.contract.document import read_json, to_document
from edge_agent.contract.manifest import ModelSpec

MODEL_DIR = "model"
DECODER = f"{MODEL_DIR}/decoder.onnx"
HEAD = f"{MODEL_DIR}/head.onnx"
HEAD_IDS = f"{MODEL_DIR}/head_ids.bin"
TOKEN_TABLE = f"{MODEL_DIR}/tokens.safetensors"
VOCABULARY_NAME = "vocabulary.json"
PARITY_NAME = "parity.json"
PROOF_NAME = "proof.json"
SENSITIVITY_NAME = "sensitivity.json"
SPEC_NAME = "spec.json"


def write_spec(folder: Path, spec: ModelSpec) -> None:
    """Write ``spec.json``."""
    (folder / SPEC_NAME).write_text(json.dumps(to_document(spec, exclude_none=True), indent=2) + "\n", "utf-8")


def read_spec(folder: Path) -> ModelSpec:
    """Read ``spec.json`` of an earlier stage (whose hash the pipeline has checked)."""
    return read_json(ModelSpec, (folder / SPEC_NAME).read_bytes())


def link_or_copy(source: Path, target: Path) -> None:
    """Take a file over from an earlier stage: for nothing where the file system can, by copying where not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
