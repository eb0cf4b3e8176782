"""The ``edge-export`` command: results on stdout, talk on stderr; exit 0 done, 1 failed, 2 wrong usage."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from edge_agent.errors import EdgeError
from export.boards import load_boards
from export.commands.build import add_build
from export.commands.evaluate import add_eval
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
    add_eval(commands)
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


def _synth(arguments: argparse.Namespace) -> int:
    from export.checkpoint.synth import synthesise

    parameters = synthesise(arguments.like, arguments.folder, layers=arguments.layers)
    print(f"{arguments.folder}  {parameters:,} random parameters in the shape of {arguments.like}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
