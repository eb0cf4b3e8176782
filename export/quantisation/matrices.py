"""The matrices of a graph that can be quantised: every MatMul by a stored weight, the head and its table included."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto

from edge_agent.errors import PermanentError
from export.graphs.graph import EMBEDDING, head_node


@dataclass(frozen=True)
class Matrix:
    """One stored matrix and the MatMul that it serves.

    Args:
        node: name of the MatMul.
        weight: name of the initializer.
        multiplied: name of the tensor that is multiplied with it.
        rows: outputs.
        columns: inputs.
        transposed: whether the initializer is [columns, rows], as MatMul wants it; a head's table is [rows, columns].
        is_head: whether it produces the logits.
    """

    node: str
    weight: str
    multiplied: str
    rows: int
    columns: int
    transposed: bool
    is_head: bool

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is looked up in it."""
        return self.weight == EMBEDDING


def stored_matrices(model: ModelProto) -> list[Matrix]:
    """Every matrix that can be quantised, in order of evaluation; a tied table once, as the head.

    Raises:
        PermanentError: ``export.graph_unexpected`` when the head's weight is neither stored nor a transposed table.
    """
    dims = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) == 2}
    head = head_node(model)
    found = []
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in dims:
            columns, rows = dims[node.input[1]]
            found.append(Matrix(node.name, node.input[1], node.input[0], rows, columns, True, node.name == head.name))
    if not any(matrix.is_head for matrix in found):
        table = _transposed_table(model, head)
        rows, columns = dims[table]
        found.append(Matrix(head.name, table, head.input[0], rows, columns, False, True))
    return found


def read_matrix(model: ModelProto, matrix: Matrix) -> torch.Tensor:
    """The weights, float32 [rows, columns], as a view where they are stored transposed."""
    stored = read_tensor(initializer(model, matrix.weight))
    return stored.t() if matrix.transposed else stored


def read_tensor(tensor: TensorProto) -> torch.Tensor:
    """A stored float32 tensor, copied once."""
    if tensor.data_type != TensorProto.FLOAT:
        raise PermanentError("export.graph_unexpected", f"{tensor.name} is not stored as float32")
    return torch.from_numpy(np.frombuffer(bytearray(tensor.raw_data), np.float32).reshape(tuple(tensor.dims)))


def initializer(model: ModelProto, name: str) -> TensorProto:
    """A stored tensor by name.

    Raises:
        PermanentError: ``export.graph_unexpected``.
    """
    for tensor in model.graph.initializer:
        if tensor.name == name:
            found: TensorProto = tensor
            return found
    raise PermanentError("export.graph_unexpected", f"the graph holds no weight {name}")


def _transposed_table(model: ModelProto, head: NodeProto) -> str:
    source = next((node for node in model.graph.node if head.input[1] in node.output), None)
    if source is None or source.op_type != "Transpose" or source.input[0] != EMBEDDING:
        raise PermanentError(
            "export.graph_unexpected", f"the head's weight comes from {source.op_type if source else head.input[1]}"
        )
    return str(source.input[0])
