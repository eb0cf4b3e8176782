"""Answers events with the engine of whatever Python runs this file, and says what that was.

A script for other interpreters (an emulated one, one with another build of ONNX Runtime): it imports the device's
package and nothing of the exporter. It reads one JSON object from stdin::

    {"bundle": DIR, "digest": HEX, "threads": N, "deadline_s": S, "asked": [[TASK, EVENT], …]}

and writes one as the last line of stdout::

    {"machine": …, "emulator": …, "device": …, "onnxruntime": …, "providers": […],
     "answers": [{"decision": …} | {"error": {"code": …, …}}, …]}
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

from edge_agent.errors import EdgeError

DEVICE_TREE_MODEL = Path("/proc/device-tree/model")
# Of a thread, not of the process: the emulator answers for the process with the emulated program's name.
_THREAD_EXE = Path("/proc/thread-self/exe")


def machine_facts() -> dict[str, str | None]:
    """What runs this code.

    Returns:
        ``machine`` as the kernel names it (``aarch64``), ``emulator`` (``qemu-aarch64``, None on the machine itself),
        and ``device``, the board's model where the firmware tells it.
    """
    try:
        model = DEVICE_TREE_MODEL.read_text("utf-8").strip("\0 \n") or None
    except (OSError, UnicodeDecodeError):
        model = None
    return {"machine": platform.machine(), "emulator": _emulator(), "device": model}


def _emulator() -> str | None:
    try:
        program = _THREAD_EXE.readlink().name
    except OSError:
        return None
    return program.removesuffix("-static") if program.startswith("qemu-") else None


def testify(request: dict[str, Any]) -> dict[str, Any]:
    """Load a bundle and answer.

    Args:
        request: as in the module's description.

    Returns:
        As in the module's description.

    Raises:
        EdgeError: when the bundle cannot be loaded.
    """
    # Here, so that the facts above can be had without the inference libraries.
    import onnxruntime

    from edge_agent.runtime.bundle import open_installed_bundle
    from edge_agent.runtime.engine import Engine

    engine = Engine(open_installed_bundle(Path(request["bundle"]), request["digest"]), request["threads"])
    answers: list[dict[str, Any]] = []
    for task, event in request["asked"]:
        try:
            answer = engine.decide(task, event, deadline_s=request["deadline_s"])
            answers.append({"decision": answer.decision})
        except EdgeError as error:
            answers.append({"error": error.as_dict()})
    return {
        **machine_facts(),
        "onnxruntime": onnxruntime.__version__,
        "providers": list(engine.facts().providers),
        "answers": answers,
    }


def _main() -> int:
    try:
        reply = testify(json.load(sys.stdin))
    except EdgeError as error:
        reply = {"error": error.as_dict()}
    sys.stdout.write("\n" + json.dumps(reply))
    return 1 if "error" in reply else 0


if __name__ == "__main__":
    sys.exit(_main())
