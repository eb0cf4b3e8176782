"""The demo's four releases, all derived from one good bundle.

v1 is the bundle itself; v2 differs in its task file only; v3 has damaged weights and answers wrongly; v4 is right on
everything short and exhausts its worker's memory on long events, which no golden example is.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from edge_agent.contract.manifest import MANIFEST_NAME, FileEntry, Manifest, Target, read_manifest
from edge_agent.contract.manifest import verify_files as verify_bundle
from edge_agent.errors import PermanentError
from edge_agent.fs import sha256_file

# Golden examples render to some 60 tokens, a register dump to 150 and more (a digit is a token).
LONG_PASS_TOKENS = 110
# 2^52 float32: more than any address space, so the allocation fails at once and touches nothing.
_ABSURD_ELEMENTS = 1 << 52
_TARGETS: dict[str, Target] = {
    "x86_64": "cpu-x86_64",
    "amd64": "cpu-x86_64",
    "aarch64": "cpu-arm64",
    "arm64": "cpu-arm64",
}


@dataclass(frozen=True)
class Variant:
    """One release of the demo.

    Args:
        label: v1 to v4, as people say it.
        version: as the manifest says it.
        story: what is the matter with it.
        bundle: its directory.
    """

    label: str
    version: str
    story: str
    bundle: Path


def machine_target() -> Target:
    """The CPU target of this machine.

    Raises:
        PermanentError: ``demo.no_target``.
    """
    machine = platform.machine().lower()
    if machine not in _TARGETS:
        raise PermanentError("demo.no_target", f"no CPU target for machine type {machine!r}")
    return _TARGETS[machine]


def find_reference() -> Path:
    """The reference bundle of this checkout.

    Raises:
        PermanentError: ``demo.no_bundle`` with what to do.
    """
    for base in (Path(__file__).parents[2], Path.cwd()):
        bundle = base / "export" / "reference" / "bundle"
        if (bundle / MANIFEST_NAME).is_file():
            return bundle
    raise PermanentError("demo.no_bundle", "no reference bundle in this checkout; name one with --bundle DIR")


def make_variants(source: Path, directory: Path) -> list[Variant]:
    """Write the four bundles, unsigned.

    Args:
        source: a good bundle.
        directory: each bundle becomes a folder there.

    Raises:
        EdgeError: when ``source`` is not a whole bundle.
    """
    manifest, _ = read_manifest(source)
    verify_bundle(source, manifest)
    decoder = manifest.model.decoder
    changes: list[tuple[str, str, Callable[[Path], None] | None]] = [
        ("v1", "the reference model", None),
        ("v2", "same weights, stricter thresholds", lambda b: _stricter(b, manifest.tasks)),
        ("v3", "weights damaged before signing: answers wrongly", lambda b: _damage_weights(b / decoder)),
        ("v4", "runs out of memory on long events", lambda b: _starve_on_long_events(b / decoder)),
    ]
    variants = []
    for minor, (label, story, change) in enumerate(changes):
        variant = Variant(label, f"1.{minor}.0", story, directory / label)
        _write(source, manifest, variant, change)
        variants.append(variant)
    return variants


def _write(source: Path, manifest: Manifest, variant: Variant, change: Callable[[Path], None] | None) -> None:
    bundle = variant.bundle
    for entry in manifest.files:
        target = bundle / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / entry.path, target)
    if change is not None:
        change(bundle)
    files = tuple(
        FileEntry(path=entry.path, size=path.stat().st_size, sha256=sha256_file(path))
        for entry in manifest.files
        if (path := bundle / entry.path).exists()
    )
    # The graphs for the CPU targets are the same; only the name on the box must be this machine's.
    made = replace(manifest, version=variant.version, target=machine_target(), files=files)
    (bundle / MANIFEST_NAME).write_bytes(made.to_bytes())


def _stricter(bundle: Path, tasks: tuple[str, ...]) -> None:
    for task in tasks:
        path = bundle / "tasks" / task / "task.yaml"
        spec = yaml.safe_load(path.read_text("utf-8"))
        spec["version"] += 1
        given = spec.get("thresholds", {})
        # A floor that the exporter chose belongs to its calibration: it stays.
        plain = {name: p for name, p in given.items() if isinstance(p, int | float)}
        spec["thresholds"] = {**given, **{name: min(0.95, round(p + 0.1, 3)) for name, p in plain.items()}}
        path.write_text(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True), "utf-8")


def _damage_weights(decoder: Path) -> None:
    import onnx

    model = onnx.load(str(decoder))
    packed = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.UINT8 and len(t.dims) >= 2]
    # Where nothing is quantised, the float matrices will do.
    for tensor in packed or [t for t in model.graph.initializer if len(t.dims) >= 2]:
        tensor.raw_data = tensor.raw_data[::-1]
    _save(model, decoder)


def _starve_on_long_events(decoder: Path) -> None:
    """Insert nodes before ``logits`` that allocate nothing for short passes and everything for long ones."""
    import onnx
    from onnx import helper

    model = onnx.load(str(decoder))
    graph = model.graph
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == "logits":
                node.output[index] = "demo_logits"
    int64 = onnx.TensorProto.INT64
    graph.initializer.extend(
        [
            helper.make_tensor("demo_limit", int64, [1], [LONG_PASS_TOKENS]),
            helper.make_tensor("demo_zero", int64, [1], [0]),
            helper.make_tensor("demo_min", int64, [], [0]),
            helper.make_tensor("demo_max", int64, [], [1]),
            helper.make_tensor("demo_size", int64, [1], [_ABSURD_ELEMENTS]),
        ]
    )
    graph.node.extend(
        [
            helper.make_node("Shape", ["input_ids"], ["demo_length"], start=1, end=2),  # (1,)
            helper.make_node("Sub", ["demo_length", "demo_limit"], ["demo_excess"]),
            helper.make_node("Clip", ["demo_excess", "demo_min", "demo_max"], ["demo_long"]),  # 0 or 1
            helper.make_node("Mul", ["demo_long", "demo_size"], ["demo_shape"]),
            helper.make_node("ConstantOfShape", ["demo_shape"], ["demo_buffer"]),  # float32 (0,) or (absurd,)
            helper.make_node("ReduceSum", ["demo_buffer", "demo_zero"], ["demo_nothing"], keepdims=1),  # (1,)
            helper.make_node("Add", ["demo_logits", "demo_nothing"], ["logits"]),
        ]
    )
    _save(model, decoder)


def _save(model: Any, decoder: Path) -> None:
    import onnx

    # Written as one file: a model this small needs no external weights.
    for leftover in decoder.parent.glob(f"{decoder.name}.data*"):
        leftover.unlink()
    onnx.save_model(model, str(decoder), save_as_external_data=False)
