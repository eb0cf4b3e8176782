"""x86 processors with AVX2 but without VNNI, emulated: their instruction for uint8 times int8 saturates at 16 bits.

ONNX Runtime uses it there by default. Weights of `export.quantisation.int8_rows` leave it nothing to saturate.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.quantisation.int8_rows import round_columns

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.needs("qemu-x86_64-static", "machine:x86_64"),
]

INPUTS, OUTPUTS = 192, 64
MULTIPLY = """
import sys
import numpy as np
import onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
np.save(sys.argv[3], session.run(None, {"codes": np.load(sys.argv[2])})[0])
"""


def product_on(
    cpu: str, weight: npt.NDArray[np.int8], codes: npt.NDArray[np.uint8], folder: Path
) -> npt.NDArray[np.float32]:
    """``(codes - 128) @ weight`` by ONNX Runtime on an emulated processor, float32 [rows, outputs]."""
    tensors: dict[str, np.ndarray] = {
        "weight": weight,
        "one": np.array(1, np.float32),
        "middle": np.array(128, np.uint8),
        "zero": np.array(0, np.int8),
    }
    order = ["codes", "weight", "one", "one", "middle", "zero"]
    node = helper.make_node("MatMulIntegerToFloat", order, ["product"], domain="com.microsoft")
    inputs = helper.make_tensor_value_info("codes", TensorProto.UINT8, ["rows", INPUTS])
    outputs = helper.make_tensor_value_info("product", TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph([node], "product", [inputs], [outputs], stored)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    (folder / "product.onnx").write_bytes(model.SerializeToString())
    np.save(folder / "codes.npy", codes)
    files = [str(folder / name) for name in ("product.onnx", "codes.npy", "product.npy")]
    done = subprocess.run(
        ["qemu-x86_64-static", "-cpu", cpu, sys.executable, "-c", MULTIPLY, *files],
        env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    found: npt.NDArray[np.float32] = np.load(folder / "product.npy")
    return found


@pytest.mark.parametrize("cpu", ["Haswell", "Skylake-Server"])
def test_product_is_exact_where_the_processor_saturates(cpu: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    floats = torch.from_numpy(rng.standard_normal((OUTPUTS, INPUTS)).astype(np.float32))
    weight = round_columns(floats).codes  # [inputs, outputs]
    codes = rng.integers(1, 256, (8, INPUTS)).astype(np.uint8)
    codes[0], codes[1] = 255, np.where(weight[:, 0] > 0, 255, 1)
    exact = (codes.astype(np.int64) - 128) @ weight.astype(np.int64)
    assert np.array_equal(product_on(cpu, weight, codes, tmp_path), exact)
    # And the same codes by a weight that uses all of int8 are not: else the test could not fail.
    plain = np.where(weight > 0, 127, -127).astype(np.int8)
    exact = (codes.astype(np.int64) - 128) @ plain.astype(np.int64)
    assert not np.array_equal(product_on(cpu, plain, codes, tmp_path), exact)
