"""The ``edge-export`` command: results on stdout, talk on stderr; exit 0 done, 1 failed, 2 wrong usage."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_agent.contract.manifest import read_manifest
from edge_agent.errors import EdgeError
from export.boards import load_boards
from export.commands.build import add_build, only, quiet_libraries
from export.commands.report import add_report
from export.commands.shrink import add_commands as add_shrink

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
        print("edge-export: interrupted; finished stages are kept, the same command goes on there", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-export",
        description="Turn a Hugging Face checkpoint into a signed bundle for a target.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_build(commands)
    add_shrink(commands)
    add_report(commands)
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
        print(f"{board.name:<12} {buildable:<4} {board.verification:<11} {precisions:<16} {board.note}")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from edge_agent.contract.task import load_task
    from export.proof.evaluate import evaluate, read_labelled
    from export.proof.measure import bundle_backend

    quiet_libraries()
    manifest, digest = read_manifest(arguments.bundle)
    task_name = arguments.task or only(manifest.tasks)
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
    from export.checkpoint.synth import synthesise

    parameters = synthesise(arguments.like, arguments.folder, layers=arguments.layers)
    print(f"{arguments.folder}  {parameters:,} random parameters in the shape of {arguments.like}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
