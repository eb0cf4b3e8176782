"""The ``edge-export`` command: results on stdout, talk on stderr; exit 0 done, 1 failed, 2 wrong usage."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_agent.contract.manifest import read_manifest
from edge_agent.errors import EdgeError, RefusedError
from export.boards import load_boards

EPILOG = """examples:
  edge-export build ./checkpoint --target cpu-x86_64 --task ./tasks/triage --out ./bundle
  edge-export eval ./bundle --data heldout.jsonl
  edge-export synth --like smollm2-135m ./synthetic
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run one command."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except EdgeError as error:
        if getattr(arguments, "json", False):
            print(json.dumps({"error": error.as_dict()}))
        print(f"edge-export: {error}", file=sys.stderr)
        return 2 if error.code == "export.usage" else 1
    except KeyboardInterrupt:
        print("edge-export: interrupted, nothing was written", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-export",
        description="Turn a Hugging Face checkpoint into a signed bundle for a target.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_build(commands)
    sign = commands.add_parser("sign", help="sign a bundle (again)", description="Hash every file, then sign.")
    sign.add_argument("bundle", type=Path)
    sign.add_argument(
        "--key", type=Path, metavar="FILE", help="Ed25519 private key (PEM); default: the developer's own"
    )
    sign.set_defaults(command=_sign)
    targets = commands.add_parser("targets", help="list targets and how far each was verified")
    targets.add_argument("--json", action="store_true")
    targets.set_defaults(command=_targets)
    _add_eval(commands)
    synth = commands.add_parser(
        "synth",
        help="write a random-weight checkpoint of a published shape",
        epilog="example: edge-export synth --like qwen2.5-0.5b ./synthetic",
    )
    synth.add_argument("--like", required=True, metavar="SHAPE", help="smollm2-135m, qwen2.5-0.5b, …")
    synth.add_argument("--layers", type=int, help="other than the published number of layers")
    synth.add_argument("folder", type=Path)
    synth.set_defaults(command=_synth)
    return parser


def _add_build(commands: Any) -> None:
    build = commands.add_parser(
        "build",
        help="build a bundle",
        description="Build, verify, quantise, measure, pack and sign. --out appears only when all of it succeeded.",
        epilog="example: edge-export build ./checkpoint --target cpu-x86_64 --task ./tasks/triage --out ./bundle",
    )
    build.add_argument("checkpoint", type=Path, help="folder with config.json, *.safetensors and tokenizer.json")
    build.add_argument("--target", required=True, help="see `edge-export targets`")
    build.add_argument("--task", required=True, type=Path, nargs="+", action="extend", metavar="DIR")
    build.add_argument("--out", required=True, type=Path, metavar="DIR")
    build.add_argument("--precision", choices=("int4", "fp32"), default="int4")
    build.add_argument("--method", choices=("rtn", "k_quant", "hqq"), default="k_quant")
    build.add_argument("--block-size", type=int, choices=(32, 64, 128), default=32)
    build.add_argument("--max-context", type=int, default=2048, metavar="TOKENS")
    build.add_argument("--name", help="default: the checkpoint folder's name")
    build.add_argument("--version", default="0.1.0")
    build.add_argument("--calibrate-on", action="append", default=[], metavar="[TASK=]FILE", help="fit temperatures")
    build.add_argument("--evaluate-on", action="append", default=[], metavar="[TASK=]FILE", help="measure accuracy")
    build.add_argument("--quality", type=Path, metavar="FILE", help="embed figures that were measured before")
    build.add_argument("--sign-key", type=Path, metavar="FILE", help="Ed25519 private key (PEM); default: your own")
    build.add_argument("--work", type=Path, metavar="DIR", help="keep the stages' outputs here and reuse them")
    build.add_argument("--force", action="store_true", help="replace an existing bundle at --out")
    build.add_argument("--json", action="store_true", help="print the result as JSON")
    build.set_defaults(command=_build)


def _add_eval(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="measure a bundle on labelled events",
        description='Answer JSON lines of {"event": {...}, "decision": {...}} with the device\'s own engine.',
        epilog="example: edge-export eval ./bundle --data heldout.jsonl --json",
    )
    evaluate.add_argument("bundle", type=Path)
    evaluate.add_argument("--data", required=True, type=Path, metavar="FILE.jsonl")
    evaluate.add_argument("--task", help="needed when the bundle has several")
    evaluate.add_argument("--limit", type=int, help="only the first N events")
    evaluate.add_argument("--oracle", action="store_true", help="use the slow reference decoder instead of the engine")
    evaluate.add_argument("--json", action="store_true")
    evaluate.set_defaults(command=_eval)


def _build(arguments: argparse.Namespace) -> int:
    from export.build import Workplace, build
    from export.progress import best_progress
    from export.quantize import QuantSettings
    from export.request import BuildRequest, Identity, Measurement, read_quality
    from export.signing import load_signing_key

    _quiet_libraries()
    request = BuildRequest(
        checkpoint=arguments.checkpoint,
        tasks=tuple(arguments.task),
        identity=Identity(
            name=arguments.name or arguments.checkpoint.resolve().name.lower(),
            version=arguments.version,
            target=arguments.target,
        ),
        precision=arguments.precision,
        quantisation=QuantSettings(arguments.method, arguments.block_size),
        max_context_tokens=arguments.max_context,
        measurement=Measurement(
            calibrate_on=_by_task(arguments.calibrate_on, arguments.task),
            evaluate_on=_by_task(arguments.evaluate_on, arguments.task),
            quality=read_quality(arguments.quality) if arguments.quality else {},
        ),
    )
    key = load_signing_key(arguments.sign_key)
    result = build(request, arguments.out, key, Workplace(best_progress(), arguments.work, arguments.force))
    if arguments.json:
        print(json.dumps({"digest": result.digest, "out": str(arguments.out), "report": result.report}, indent=2))
    else:
        print(f"{arguments.out}  {result.manifest.name} {result.manifest.version}  sha256:{result.digest}")
    return 0


def _sign(arguments: argparse.Namespace) -> int:
    from export.signing import load_signing_key, sign_bundle

    print(sign_bundle(arguments.bundle, load_signing_key(arguments.key)))
    return 0


def _targets(arguments: argparse.Namespace) -> int:
    boards = load_boards()
    if arguments.json:
        print(json.dumps({name: board.model_dump(mode="json") for name, board in boards.items()}, indent=2))
        return 0
    for board in boards.values():
        precisions = ", ".join(board.precisions) or "-"
        buildable = "yes" if board.buildable else "no"
        print(f"{board.name:<12} {buildable:<4} {board.verification:<11} {precisions:<11} {board.note}")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from edge_agent.contract.task import load_task
    from export.evaluate import evaluate, read_labelled
    from export.measure import bundle_backend

    _quiet_libraries()
    manifest, digest = read_manifest(arguments.bundle)
    task_name = arguments.task or _only(manifest.tasks)
    task = load_task(arguments.bundle / "tasks" / task_name / "task.yaml")
    rows = read_labelled(arguments.data, task, arguments.limit)
    with bundle_backend(arguments.bundle, task, oracle=arguments.oracle) as decide:
        quality = evaluate(decide, rows, task)
    if arguments.json:
        precision = manifest.model.precision
        print(json.dumps({"task": task_name, "precision": precision, "digest": digest, **quality.as_dict()}, indent=2))
        return 0
    print(f"{manifest.name} {manifest.version} ({manifest.model.precision}), task {task_name}, {quality.rows} events")
    print(f"{'field':<16}{'accuracy':>9}{'ECE':>8}")
    for name, share in quality.accuracy.items():
        print(f"{name:<16}{share:>9.2%}{quality.ece[name]:>8.3f}")
    print(f"{'every field':<16}{quality.exact:>9.2%}")
    print(
        f"{'confident':<16}{quality.answered:>9.2%}  of events; right in every field: {quality.exact_when_answered:.2%}"
    )
    return 0


def _synth(arguments: argparse.Namespace) -> int:
    from export.synth import synthesise

    parameters = synthesise(arguments.like, arguments.folder, layers=arguments.layers)
    print(f"{arguments.folder}  {parameters:,} random parameters in the shape of {arguments.like}")
    return 0


def _by_task(given: list[str], folders: list[Path]) -> dict[str, Path]:
    """``TASK=FILE`` entries; a bare ``FILE`` belongs to the only task."""
    from edge_agent.contract.task import load_task

    result: dict[str, Path] = {}
    for entry in given:
        name, equals, file = entry.partition("=")
        if not equals:
            name, file = _only([load_task(folder / "task.yaml").name for folder in folders]), entry
        result[name] = Path(file)
    return result


def _only(names: Sequence[str]) -> str:
    if len(names) != 1:
        raise RefusedError("export.usage", f"there are several tasks ({', '.join(names)}): name one")
    return names[0]


def _quiet_libraries() -> None:
    # onnxruntime's quantiser configures the root logger for INFO when it is imported.
    import onnxruntime.quantization.matmul_nbits_quantizer  # noqa: F401 - for that side effect, once

    logging.getLogger().setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
