"""``edge-export prune`` and ``edge-export distil``: a smaller checkpoint from a larger one and a task's events."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENTS_HELP = 'JSON lines of {"event": {...}, "decision": {...}}; without a decision the checkpoint answers'


def add_commands(commands: Any) -> None:
    """Add both commands.

    Args:
        commands: what ``ArgumentParser.add_subparsers`` returned.
    """
    prune = commands.add_parser(
        "prune",
        help="take out the layers that a task needs least",
        description="Measure what each layer does for the task's answers, take out the least, train what is left.",
        epilog="example: edge-export prune ./checkpoint --drop-layers 2 --task ./triage --data e.jsonl --out ./few",
    )
    _add_shared(prune)
    prune.add_argument("--drop-layers", type=int, required=True, metavar="N")
    prune.add_argument("--no-recovery", action="store_true", help="measure and take out, train nothing")
    prune.set_defaults(command=_prune)
    distil = commands.add_parser(
        "distil",
        help="teach a smaller network a task's decisions",
        description="Make a network of a smaller shape and teach it the checkpoint's decisions on the task's events.",
        epilog="example: edge-export distil ./checkpoint --into half-width --task ./triage --data e.jsonl --out ./s",
    )
    _add_shared(distil)
    distil.add_argument(
        "--into",
        required=True,
        metavar="CONFIG",
        help="half-width, half-depth, half-both, or a JSON file with hidden_size, intermediate_size, "
        "num_hidden_layers, num_attention_heads, num_key_value_heads or head_dim",
    )
    distil.set_defaults(command=_distil)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder with config.json, *.safetensors and tokenizer.json")
    parser.add_argument("--task", required=True, type=Path, metavar="DIR")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE.jsonl", help=EVENTS_HELP)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new checkpoint; absent or empty")
    parser.add_argument("--work", type=Path, metavar="DIR", help="training state, to go on after an interruption")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, help="of training, about (default 10)")
    budget.add_argument("--steps", type=int, help="of training, exactly: repeats a run on the same kind of machine")
    parser.add_argument(
        "--rate", type=float, help="highest learning rate (default 0.0001 after pruning, 0.001 for a student)"
    )
    parser.add_argument("--threads", type=int, default=1, help="for the training (default 1)")
    parser.add_argument("--no-int4", action="store_true", help="do not train the last part with rounded weights")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def _prune(arguments: argparse.Namespace) -> int:
    from export.smaller.prune import Pruning, drop_layers
    from export.smaller.recovery import PRUNED_RATE

    training = None if arguments.no_recovery else _training(arguments, PRUNED_RATE)
    wanted = Pruning(arguments.drop_layers, training)
    return _run(arguments, lambda **given: drop_layers(pruning=wanted, **given))


def _distil(arguments: argparse.Namespace) -> int:
    from export.smaller.distil import Distillation, distil
    from export.smaller.recovery import STUDENT_RATE

    wanted = Distillation(arguments.into, _training(arguments, STUDENT_RATE))
    return _run(arguments, lambda **given: distil(wanted=wanted, **given))


def _training(arguments: argparse.Namespace, usual_rate: float) -> Any:
    from export.smaller.recovery import INT4_NEVER, Training

    plain = Training()
    return Training(
        minutes=None
        if arguments.steps is not None
        else plain.minutes
        if arguments.minutes is None
        else arguments.minutes,
        steps=arguments.steps,
        peak_rate=usual_rate if arguments.rate is None else arguments.rate,
        threads=arguments.threads,
        int4_from=INT4_NEVER if arguments.no_int4 else plain.int4_from,
    )


def _run(arguments: argparse.Namespace, make: Callable[..., dict[str, Any]]) -> int:
    from edge_agent.contract.task import load_task
    from export.smaller.lessons import read_rows
    from export.tasks import TASK_NAME

    task = load_task(arguments.task / TASK_NAME)
    rows = read_rows(arguments.data, task)
    out: Path = arguments.out
    work = arguments.work or out.parent / f".{out.name}.training"
    facts = make(source=arguments.checkpoint, out=out, task=task, rows=rows, work=work, log=_log)
    if arguments.work is None:
        shutil.rmtree(work, ignore_errors=True)
    whole = facts["parent"]["parameters"]
    line = json.dumps(facts, indent=2) if arguments.json else f"{out}  {facts['parameters']:,} of {whole:,} parameters"
    sys.stdout.write(f"{line}\n")
    return 0


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
