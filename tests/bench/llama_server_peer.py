"""llama.cpp's own server, compiled for this machine from the sources inside the pinned llama-cpp-python package."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from tests.bench.cache import cached
from tests.bench.llama_cpp_peer import PACKAGE, cpu_flags, llama_cpp_sources

BINARY = "llama-server"
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
"""With every instruction of this machine, and nothing that would be fetched while it is built."""
_SOURCES = "vendor/llama.cpp"


def llama_server() -> Path:
    """The server's binary; compiles it once (some 15 minutes of CPU).

    Raises:
        subprocess.CalledProcessError: no compiler, or no way to the package; its ``stderr`` says which.
    """
    key = {
        "package": PACKAGE,
        "cmake": CMAKE_OPTIONS,
        "machine": platform.machine(),
        "cpu_flags": cpu_flags(),
    }
    return cached("llama-server", key, _compile) / BINARY


def _compile(folder: Path) -> None:
    scratch = folder / "scratch"
    scratch.mkdir()
    sources = llama_cpp_sources(scratch)
    build = scratch / "build"
    _checked(["cmake", "-S", str(sources / _SOURCES), "-B", str(build), *CMAKE_OPTIONS])
    _checked(["cmake", "--build", str(build), "--target", BINARY, "--parallel", str(os.cpu_count() or 1)])
    shutil.copy2(build / "bin" / BINARY, folder / BINARY)
    shutil.rmtree(scratch)


def _checked(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise subprocess.CalledProcessError(127, command, stderr=f"{command[0]} is not installed") from error
