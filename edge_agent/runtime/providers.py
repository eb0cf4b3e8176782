"""Which of ONNX Runtime's execution providers runs a target's graphs, and how it is asked for.

The CPU's provider is in every build. Qualcomm's is a plugin library from a wheel of its own (``onnxruntime-qnn``),
OpenVINO's and CUDA's come with other builds of ONNX Runtime (``onnxruntime-openvino``, ``onnxruntime-gpu``). None is a
dependency: a gateway installs the one that its hardware has.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from typing import Any

# Before the import below: the official Linux wheels report usage over the network by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort

from edge_agent.contract.manifest import Target
from edge_agent.errors import PermanentError

CPU = "CPUExecutionProvider"
QNN = "QNNExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
CUDA = "CUDAExecutionProvider"
PROVIDERS: dict[Target, str] = {
    "cpu-arm64": CPU,
    "cpu-x86_64": CPU,
    "cuda-jetson": CUDA,
    "openvino": OPENVINO,
    "qnn-htp": QNN,
}
"""The provider of each target that this agent can run."""
DYNAMIC = frozenset({CPU, CUDA})
"""Providers that take graphs of any length; the others would leave such a graph to the CPU without a word."""
CACHE_DEVICES = {CUDA: "cuda"}
"""Where a provider's caches lie, if not in ordinary memory."""
QNN_OPTIONS = {"backend_type": "htp"}
"""On x86-64 the wheel's HTP library is a slow emulator of the NPU, bit by bit; on a Qualcomm board it is the NPU."""
OPENVINO_OPTIONS = {"device_type": "CPU"}
"""The one OpenVINO device that was verified; its NPU compiler is not in the Linux wheels."""


def use_provider(target: Target, options: Any) -> dict[str, Any]:
    """Ask for a target's provider.

    Args:
        target: of the manifest.
        options: `onnxruntime.SessionOptions`; a plugin's device is added to them.

    Returns:
        Keyword arguments for `onnxruntime.InferenceSession`.

    Raises:
        PermanentError: ``bundle.unsupported`` when this machine's ONNX Runtime lacks the provider.
    """
    provider = PROVIDERS.get(target)
    if provider == QNN:
        options.add_provider_for_devices(qnn_devices(), QNN_OPTIONS)
        return {"sess_options": options}
    if provider is None or provider not in ort.get_available_providers():
        available = ", ".join(ort.get_available_providers())
        raise PermanentError("bundle.unsupported", f"no provider for target {target}; here: {available}")
    if provider in (CPU, CUDA):  # a GPU leaves the arithmetic of lengths to the CPU
        return {"sess_options": options, "providers": [provider]}
    # What OpenVINO cannot do must fail here, not run unnoticed in ONNX Runtime's own kernels.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return {"sess_options": options, "providers": [(provider, OPENVINO_OPTIONS)]}


def check_loaded(target: Target, providers: Sequence[str]) -> None:
    """Refuse a session that runs elsewhere: where CUDA's libraries are missing, ONNX Runtime takes the CPU and goes on.

    Args:
        target: of the manifest.
        providers: those of the session, strongest first.

    Raises:
        PermanentError: ``bundle.unsupported``.
    """
    wanted = PROVIDERS.get(target)
    if wanted != providers[0]:
        raise PermanentError("bundle.unsupported", f"{wanted} does not load here; {providers[0]} came in its place")


@functools.cache
def qnn_devices() -> list[Any]:
    """Register Qualcomm's plugin, once a process, and list the devices that it offers.

    Raises:
        PermanentError: ``bundle.unsupported`` when the package ``onnxruntime-qnn`` is missing or does not load.
    """
    try:
        plugin = importlib.import_module("onnxruntime_qnn")
        ort.register_execution_provider_library(QNN, plugin.get_library_path())
    except ImportError as error:
        raise PermanentError("bundle.unsupported", "target qnn-htp needs the package onnxruntime-qnn") from error
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        raise PermanentError("bundle.unsupported", f"Qualcomm's plugin does not load: {error}") from error
    devices = [device for device in ort.get_ep_devices() if device.ep_name == QNN]
    # A board offers its processors each for itself. An x86 machine offers its CPU, on which the NPU is emulated.
    devices.sort(key=lambda device: bool(device.device.type != ort.OrtHardwareDeviceType.NPU))
    if not devices:
        raise PermanentError("bundle.unsupported", "Qualcomm's plugin finds no device on this machine")
    return devices[:1]
