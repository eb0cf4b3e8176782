"""What llama.cpp's own quantiser makes of the same weights: the check on `tests.bench.gguf_peer`.

    build/bench/llama-cpp-…/bin/python tests/bench/llama_cpp_sizes.py MODEL-F16.gguf SCRATCH.gguf

Runs in an environment of its own that holds llama-cpp-python: nothing of this repository is imported.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp


def quantised_bytes(source: Path, scratch: Path, *, pure: bool) -> int:
    """Size of ``source`` as Q4_0.

    Args:
        source: an F16 GGUF.
        scratch: is written and removed.
        pure: whether every matrix is Q4_0, or the mix that ``llama-quantize`` chooses.
    """
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    options.pure = pure
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(scratch).encode(), ctypes.byref(options))
    if status != 0:
        raise SystemExit(f"llama_model_quantize returned {status}")
    size = scratch.stat().st_size
    scratch.unlink()
    return size


def main() -> int:
    """Command line (see the module's docstring); prints both sizes as JSON."""
    source, scratch = map(Path, sys.argv[1:])
    sizes = {name: quantised_bytes(source, scratch, pure=name == "pure") for name in ("pure", "default_mix")}
    print(json.dumps(sizes))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
