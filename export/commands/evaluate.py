"""``edge-export eval``: a bundle on labelled events, and whether its error targets were kept there."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.contract.manifest import read_manifest
from export.commands.build import only, quiet_libraries

if TYPE_CHECKING:
    from export.proof.evaluate import Quality
    from export.proof.passing import Passing


def add_eval(commands: Any) -> None:
    """Add the command to the parser."""
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


def _eval(arguments: argparse.Namespace) -> int:
    from edge_agent.contract.task import load_task
    from export.proof.evaluate import evaluate, read_labelled
    from export.proof.measure import bundle_backend, read_calibration

    quiet_libraries()
    manifest, digest = read_manifest(arguments.bundle)
    task_name = arguments.task or only(manifest.tasks)
    task = load_task(arguments.bundle / "tasks" / task_name / "task.yaml")
    rows = read_labelled(arguments.data, task, arguments.limit)
    with bundle_backend(arguments.bundle, task, oracle=arguments.oracle) as decide:
        quality = evaluate(decide, rows, task, read_calibration(arguments.bundle, task).floors)
    if arguments.json:
        precision = manifest.model.precision
        print(json.dumps({"task": task_name, "precision": precision, "digest": digest, **quality.as_dict()}, indent=2))
        return 0
    print(f"{manifest.name} {manifest.version} ({manifest.model.precision}), task {task_name}, {quality.rows} events")
    _print(quality)
    return 0


def _print(quality: Quality) -> None:
    print(f"{'field':<16}{'accuracy':>9}{'ECE':>8}")
    for name, share in quality.accuracy.items():
        print(f"{name:<16}{share:>9.2%}{quality.ece[name]:>8.3f}")
    print(f"{'every field':<16}{quality.exact:>9.2%}")
    print(
        f"{'confident':<16}{quality.answered:>9.2%}  of events; right in every field: {quality.exact_when_answered:.2%}"
    )
    if quality.floors:
        print(f"{'threshold':<16}{'floor':>9}{'passing':>9}{'wrong':>8}  {'95 % interval':<18}{'asked':>7}  verdict")
    for name, found in quality.floors.items():
        print(f"{name:<16}{_floor_line(found)}".rstrip())


def _floor_line(found: Passing) -> str:
    floor = f"{found.floor:.4g}" if math.isfinite(found.floor) else "none"
    wrong = "-" if found.wrong_share is None else f"{found.wrong_share:.2%}"
    between = "-" if found.interval is None else " to ".join(f"{end:.2%}" for end in found.interval)
    asked = "-" if found.target is None else f"{found.target.max_wrong:.3g}"
    together = f" (over {', '.join(found.over)})" if found.over else ""
    return f"{floor:>9}{found.coverage:>9.2%}{wrong:>8}  {between:<18}{asked:>7}  {found.verdict or ''}{together}"
