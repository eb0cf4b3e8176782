"""llama.cpp, compiled for this machine, in an environment of its own: the exporter's own must not depend on it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

from tests.bench.cache import cached

PACKAGE = "llama-cpp-python==0.3.36"
CMAKE_ARGS = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_CURL=OFF"
"""With every instruction of this machine: what somebody gets who builds llama.cpp for the board at hand."""


def llama_cpp_python() -> Path:
    """The interpreter of an environment that holds llama-cpp-python; compiles it once (some 7 minutes of CPU).

    Raises:
        subprocess.CalledProcessError: no compiler, or no way to the package; its ``stderr`` says which.
    """
    key = {
        "package": PACKAGE,
        "cmake": CMAKE_ARGS,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_flags": cpu_flags(),
    }
    return cached("llama-cpp", key, _install) / "bin" / "python"


def _install(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True, text=True)
    subprocess.run(
        [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "numpy", PACKAGE],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "CMAKE_ARGS": CMAKE_ARGS, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)},
    )


def cpu_flags() -> list[str]:
    """Vector instructions of this machine that matter to INT4 kernels."""
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return []
    found = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "")
    return [flag for flag in wanted if flag in found.split()]
