"""Compiles one graph for Qualcomm's NPU and ends: `export.npu.qnn.compile_graph` runs this in a process of its own.

It reads one JSON object from stdin: ``{"source": FILE, "target": FILE, "htp_arch": N, "soc_model": N}``.
Exit status: 0 compiled, 1 failed, 2 without a compiler.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort

from edge_agent.errors import PermanentError
from edge_agent.runtime.providers import QNN_OPTIONS, qnn_devices


def compile_here(request: dict[str, Any]) -> None:
    """Compile.

    Args:
        request: as in the module's description.

    Raises:
        PermanentError: ``bundle.unsupported`` without the plugin.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    settings = {
        "ep.context_enable": "1",
        "ep.context_file_path": request["target"],
        # Inside the graph's file: one file to hash, to sign and to fetch.
        "ep.context_embed_mode": "1",
    }
    for name, value in settings.items():
        options.add_session_config_entry(name, value)
    chip = {"htp_arch": str(request["htp_arch"])}
    if request["soc_model"]:
        chip["soc_model"] = str(request["soc_model"])
    options.add_provider_for_devices(qnn_devices(), {**QNN_OPTIONS, **chip})
    # From bytes, with large weights in the working directory: another path would become part of the program's name.
    source = Path(request["source"])
    os.chdir(source.parent)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", ".")
    ort.InferenceSession(source.read_bytes(), options)


def _main() -> int:
    try:
        qnn_devices()
    except PermanentError as error:
        sys.stderr.write(error.detail)
        return 2
    compile_here(json.load(sys.stdin))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
