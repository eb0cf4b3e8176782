"""llama.cpp, compiled for this machine, in an environment of its own: the exporter's own must not depend on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.bench.cache import cached

PACKAGE = "llama-cpp-python==0.3.36"
CMAKE_ARGS = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_CURL=OFF"
"""With every instruction of this machine: what somebody gets who builds llama.cpp for the board at hand."""

_TILE_CONFIG = Path("vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp")
_LOAD = "    _tile_loadconfig(&tc);"
_KEEP = '    __asm__ volatile("" : : "r"(&tc) : "memory");'
"""GCC 12 takes ``_tile_loadconfig`` to read eight bytes and drops the stores of the other 56: a processor with AMX then
stops the program at its first matrix. One line keeps them; nothing else is changed."""


def llama_cpp_python() -> Path:
    """The interpreter of an environment that holds llama-cpp-python; compiles it once (some 7 minutes of CPU).

    Raises:
        subprocess.CalledProcessError: no compiler, or no way to the package; its ``stderr`` says which.
    """
    key = {
        "package": PACKAGE,
        "cmake": CMAKE_ARGS,
        "kept": _KEEP,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_flags": cpu_flags(),
    }
    return cached("llama-cpp", key, _install) / "bin" / "python"


def llama_cpp_sources(folder: Path) -> Path:
    """Fetch and unpack the package's sources, llama.cpp's own among them.

    Args:
        folder: where to.

    Returns:
        The unpacked folder.

    Raises:
        subprocess.CalledProcessError: no way to the package; its ``stderr`` says why.
    """
    fetch = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    fetch += ["--no-binary", PACKAGE.partition("==")[0], "--dest", str(folder), PACKAGE]
    subprocess.run(fetch, check=True, capture_output=True, text=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    archive.unlink()
    (sources,) = folder.iterdir()
    file = sources / _TILE_CONFIG
    if file.is_file():
        file.write_text(file.read_text("utf-8").replace(_LOAD, f"{_KEEP}\n{_LOAD}"), "utf-8")
    return sources


def _install(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True, text=True)
    scratch = folder / "scratch"
    scratch.mkdir()
    sources = llama_cpp_sources(scratch)
    subprocess.run(
        [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "numpy", sources],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "CMAKE_ARGS": CMAKE_ARGS, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)},
    )
    shutil.rmtree(scratch)


def cpu_flags() -> list[str]:
    """Vector instructions of this machine that matter to INT4 kernels."""
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return []
    found = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "")
    return [flag for flag in wanted if flag in found.split()]
