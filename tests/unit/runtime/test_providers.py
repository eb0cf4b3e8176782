"""A target's provider is used or the bundle is refused: nothing runs unnoticed elsewhere."""

from __future__ import annotations

from typing import get_args

import onnxruntime as ort
import pytest

from edge_agent.contract.manifest import Target
from edge_agent.errors import PermanentError
from edge_agent.runtime.providers import CPU, CUDA, PROVIDERS, check_loaded, use_provider


def test_every_target_has_a_provider() -> None:
    assert set(PROVIDERS) == set(get_args(Target))


def test_cpu_targets_ask_for_the_cpu() -> None:
    for target in ("cpu-arm64", "cpu-x86_64"):
        assert use_provider(target, ort.SessionOptions())["providers"] == [CPU]


def test_gpu_that_is_absent_is_refused_before_the_graph_is_read() -> None:
    if CUDA in ort.get_available_providers():
        assert use_provider("cuda-jetson", ort.SessionOptions())["providers"] == [CUDA]
    else:
        with pytest.raises(PermanentError, match=r"^bundle\.unsupported: no provider for target cuda-jetson"):
            use_provider("cuda-jetson", ort.SessionOptions())


def test_session_that_fell_back_to_the_cpu_is_refused() -> None:
    check_loaded("cpu-x86_64", [CPU])
    check_loaded("cuda-jetson", [CUDA, CPU])
    with pytest.raises(PermanentError, match=r"CUDAExecutionProvider does not load here; CPUExecutionProvider"):
        check_loaded("cuda-jetson", [CPU])
