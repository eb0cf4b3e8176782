"""The bundle's manifest: what a bundle is, file by file, and what it needs from the machine that runs it.

bundle/
  manifest.json           this file; its SHA-256 is the bundle's digest, and what is signed
  manifest.sig.json       DSSE envelope over the manifest's bytes
  model/decoder.onnx      (+ external weights)
  tokenizer.json
  tasks/<task>/task.yaml  golden.jsonl  calibration.json  adapter.safetensors
  report.json report.html
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from annotated_types import Ge, MinLen

from edge_agent.contract.bounds import Matches
from edge_agent.contract.document import DocumentError, read_document, to_document
from edge_agent.errors import IntegrityError, PermanentError, RefusedError, from_os_error
from edge_agent.fs import sha256_file

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.sig.json"
MAX_MANIFEST_BYTES = 1 << 20
MASKED_BIAS = -1000.0
"""What hides a position in a static graph. Trained attention knows scores of 100, so that -100 would not hide what a
rewound text left behind; -3.4e38, which training uses, leaves a 16-bit tensor no room for anything else."""
Sha256 = Annotated[str, Matches(r"^[0-9a-f]{64}$")]
Name = Annotated[str, Matches(r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Target = Literal["cpu-arm64", "cpu-x86_64", "cuda-jetson", "qnn-htp", "openvino"]


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of the bundle, by content."""

    path: str
    size: Annotated[int, Ge(0)]
    sha256: Sha256

    def __post_init__(self) -> None:
        path = PurePosixPath(self.path)
        if path.is_absolute() or ".." in path.parts or not path.parts or str(path) != self.path or "\\" in self.path:
            raise ValueError(f"{self.path!r} does not stay inside the bundle")


@dataclass(frozen=True, kw_only=True)
class StaticWindow:
    """One graph of a static model: it takes exactly ``tokens`` tokens a pass.

    Args:
        graph: its file inside the bundle.
        tokens: positions a pass; fewer are padded on the right and masked.
    """

    graph: str
    tokens: Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The graph's shape, as the engine needs it.

    Graph interface 1 (dynamic): inputs ``input_ids`` int64 [batch, seq], ``attention_mask`` int64 [batch, past + seq],
    ``past_key_values.<layer>.key|value`` [batch, kv_heads, past, head_dim]; outputs ``logits`` float [batch, 1, rows]
    (last position only) and ``present.<layer>.key|value``. With ``head``, the decoder gives ``hidden`` float
    [batch, 1, hidden] in place of ``logits``, and the head's graph maps ``hidden`` to ``logits``. With ``ragged``, the
    decoder also takes ``query_seqlens`` int32 [batch]. With ``score_at``, it also takes ``score_at`` int64 [scores, 2]
    (row and position within the pass of each score), and the first axis of ``logits`` or ``hidden`` is [scores]. With
    ``alternatives``, it also takes ``position_ids`` int64 [batch, seq] and ``attention_bias`` float
    [1, 1, seq, past + seq] (0 where a position may be seen, far below any score where not). With ``adapter_inputs``, it
    also takes ``<name>.A`` float [columns, rank] and ``<name>.B`` float [rank, rows] of each name; rank may be 0. A
    device that does not know an input refuses the graph, for it cannot feed it.

    Graph interface 2 (static, for NPUs): every shape is fixed. A graph of ``windows`` with T tokens takes
    ``input_ids`` int32 [1, T], ``position_ids`` int32 [1, T], ``attention_bias`` float [1, 1, T, past + T] (0 where a
    position may be seen, `MASKED_BIAS` where not), ``past_key_values.<layer>.key|value`` [1, kv_heads, past, head_dim]
    with past = ``past_tokens``; it gives ``logits`` float [1, T, rows] and ``present.<layer>.key|value``
    [1, kv_heads, T, head_dim]: of the new positions only, which the engine copies into its own window.

    Args:
        decoder: the graph that is loaded first; in interface 2 the graph of the widest window.
        head: graph of the output head where it is apart.
        head_ids: file of the token id of each row of the head: int32 little-endian. None: every token.
        windows: static graphs, widest first; interface 2 only.
        past_tokens: positions that the static past window holds; interface 2 only.
        token_table: file of the tokenizer as the device maps it (`edge_agent.runtime.token_table`); None: it is read.
        vocab_size: token ids of the tokenizer and rows of the embedding; not the head's rows.
        kv_dtype: element type of the caches.
        adapter_inputs: projections that a task may add a low-rank product to; interface 1 only.
        adapters: task to the file of its matrices; tasks that are not here use the shared weights as they are.
    """

    graph_interface: Literal[1, 2] = 1
    decoder: str
    head: str | None = None
    head_ids: str | None = None
    ragged: bool | None = None
    score_at: bool | None = None
    alternatives: bool | None = None
    windows: tuple[StaticWindow, ...] | None = None
    past_tokens: Annotated[int, Ge(1)] | None = None
    tokenizer: str
    token_table: str | None = None
    architecture: str
    precision: str
    vocab_size: Annotated[int, Ge(2)]
    num_layers: Annotated[int, Ge(1)]
    num_kv_heads: Annotated[int, Ge(1)]
    head_dim: Annotated[int, Ge(1)]
    max_context_tokens: Annotated[int, Ge(16)]
    kv_dtype: Literal["float32", "float16", "int8"] = "float32"
    bos_token_id: int | None = None
    eos_token_id: int
    adapter_inputs: tuple[str, ...] | None = None
    adapters: dict[str, str] | None = None

    def __post_init__(self) -> None:
        static = self.graph_interface == 2
        if static != bool(self.windows) or static != (self.past_tokens is not None):
            raise ValueError("graph interface 2, and only it, has windows and past_tokens")
        if static and (self.head is not None or self.ragged or self.score_at or self.alternatives):
            raise ValueError("a static graph has its head inside and takes one sequence")
        if self.alternatives and not self.score_at:
            raise ValueError("alternatives are of use only where several positions are scored")
        if (static or not self.adapter_inputs) and self.adapters:
            raise ValueError("adapters need a graph of interface 1 with adapter_inputs")

    @property
    def graph_files(self) -> tuple[str, ...]:
        """Every graph that the engine loads."""
        windows = [window.graph for window in self.windows or () if window.graph != self.decoder]
        return (self.decoder, *windows, *filter(None, (self.head,)))


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the bundle asks of the machine."""

    disk_bytes: Annotated[int, Ge(0)]
    ram_bytes: Annotated[int, Ge(0)]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A bundle's identity. Two bundles with equal digests are the same bundle."""

    format: Literal[1] = 1
    name: Name
    version: Name
    target: Target
    model: ModelSpec
    tasks: Annotated[tuple[str, ...], MinLen(1)]
    files: Annotated[tuple[FileEntry, ...], MinLen(1)]
    minimum_runtime: dict[str, str] = field(default_factory=dict)
    resources: Resources
    quality: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        paths = [f.path for f in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError("a file is listed twice")
        optional = filter(None, (self.model.head_ids, self.model.token_table))
        tasks = (f"tasks/{task}/task.yaml" for task in self.tasks)
        adapters = self.model.adapters or {}
        needed = [*self.model.graph_files, self.model.tokenizer, *optional, *tasks, *adapters.values()]
        missing = [path for path in needed if path not in paths]
        if missing:
            raise ValueError(f"files named but not listed: {', '.join(missing)}")
        if strangers := sorted(adapters.keys() - set(self.tasks)):
            raise ValueError(f"adapters of tasks that are not here: {', '.join(strangers)}")

    @property
    def size_bytes(self) -> int:
        """Sum of the files' sizes."""
        return sum(f.size for f in self.files)

    def to_bytes(self) -> bytes:
        """The canonical bytes: what is hashed, signed and written."""
        dumped = to_document(self, exclude_none=True)
        return (json.dumps(dumped, indent=2, sort_keys=True, ensure_ascii=True) + "\n").encode()


def manifest_digest(manifest_bytes: bytes) -> str:
    """The bundle's digest: hex SHA-256 of the manifest's exact bytes."""
    return hashlib.sha256(manifest_bytes).hexdigest()


def parse_manifest(manifest_bytes: bytes) -> Manifest:
    """Parse a manifest.

    Raises:
        RefusedError: ``bundle.format_unsupported`` for another major format.
        IntegrityError: ``bundle.manifest_invalid`` listing the faults.
    """
    if len(manifest_bytes) > MAX_MANIFEST_BYTES:
        raise IntegrityError("bundle.manifest_invalid", f"manifest exceeds {MAX_MANIFEST_BYTES} bytes")
    try:
        parsed = json.loads(manifest_bytes)
    except (ValueError, RecursionError) as error:
        raise IntegrityError("bundle.manifest_invalid", f"manifest is not JSON: {error}") from error
    if isinstance(parsed, dict) and parsed.get("format") not in (1, None):
        raise RefusedError("bundle.format_unsupported", f"manifest format {parsed['format']!r} is not supported")
    try:
        return read_document(Manifest, parsed)
    except DocumentError as error:
        raise IntegrityError("bundle.manifest_invalid", str(error)) from error


def read_manifest(bundle: Path) -> tuple[Manifest, str]:
    """Read ``manifest.json`` of a bundle directory.

    Returns:
        The manifest and its digest (hex SHA-256).

    Raises:
        PermanentError: ``bundle.missing`` when the directory or its manifest is not there.
    """
    path = bundle / MANIFEST_NAME
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PermanentError("bundle.missing", f"no bundle at {bundle}: {error.strerror}", path=str(bundle)) from error
    return parse_manifest(raw), manifest_digest(raw)


def verify_files(bundle: Path, manifest: Manifest, known: Mapping[str, str] | None = None) -> None:
    """Hash every listed file. Size first, because it is free and names a truncation plainly.

    Args:
        bundle: its directory.
        manifest: what it must hold.
        known: path to hex SHA-256 of files that were hashed a moment ago.

    Raises:
        IntegrityError: ``bundle.file_missing``, ``bundle.file_truncated`` or ``bundle.file_corrupt``.
    """
    for entry in manifest.files:
        path = bundle / entry.path
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError as error:
            raise from_os_error(error, f"reading {entry.path}") from error
        if size is None:
            raise IntegrityError("bundle.file_missing", f"{entry.path} is missing", path=entry.path)
        if size != entry.size:
            raise IntegrityError(
                "bundle.file_truncated", f"{entry.path} has {size} bytes, not {entry.size}", path=entry.path
            )
        if ((known or {}).get(entry.path) or sha256_file(path)) != entry.sha256:
            raise IntegrityError("bundle.file_corrupt", f"{entry.path} differs from its signed hash", path=entry.path)
