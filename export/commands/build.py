"""``edge-export build``: its options, and from options to a request."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from edge_agent.errors import RefusedError
from export.boards import Precision, buildable_board

EXAMPLES = """examples:
  edge-export build ./checkpoint --target cpu-x86_64 --task ./tasks/triage --out ./bundle
  edge-export build ./checkpoint --target cpu-arm64 --task ./tasks/triage --out ./bundle --dry-run
  edge-export build ./checkpoint --target cpu-x86_64 --task ./tasks/triage --out ./bundle --method gptq --block-size 64
"""


def add_build(commands: Any) -> None:
    """Add the command to the parser."""
    build = commands.add_parser(
        "build",
        help="build a bundle",
        description="Build, verify, quantise, measure, pack and sign. --out appears only when all of it succeeded; "
        "a build that was interrupted goes on where it stopped when the same command is given again.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("checkpoint", type=Path, help="folder with config.json, *.safetensors and tokenizer.json")
    build.add_argument("--target", required=True, help="see `edge-export targets`")
    build.add_argument("--soc", metavar="CHIP", help="the chip to compile for; default: the target's first")
    build.add_argument("--task", required=True, type=Path, nargs="+", action="extend", metavar="DIR")
    lora = "a LoRA adapter (PEFT) for one task; all tasks share the checkpoint's weights"
    build.add_argument("--adapter", action="append", default=[], metavar="TASK=FOLDER", help=lora)
    build.add_argument("--out", required=True, type=Path, metavar="DIR")
    build.add_argument("--name", help="default: the checkpoint folder's name")
    build.add_argument("--version", default="0.1.0")
    build.add_argument("--max-context", type=int, default=2048, metavar="TOKENS")
    _add_weights(build.add_argument_group("weights"))
    _add_shrinking(build.add_argument_group("a smaller checkpoint first"))
    _add_graph(build.add_argument_group("graph"))
    _add_proof(build.add_argument_group("proof"))
    build.add_argument("--sign-key", type=Path, metavar="FILE", help="Ed25519 private key (PEM); default: your own")
    build.add_argument("--work", type=Path, metavar="DIR", help="keep the stages' outputs here and reuse them")
    build.add_argument("--force", action="store_true", help="replace an existing bundle at --out")
    build.add_argument("--dry-run", action="store_true", help="print the plan and what it needs, build nothing")
    build.add_argument("--json", action="store_true", help="print the result as JSON")
    build.set_defaults(command=run_build)


def _add_weights(group: Any) -> None:
    group.add_argument("--allow-large", action="store_true", help="more than 1,000,000,000 parameters")
    group.add_argument("--trust", action="store_true", help="read pickled weights (as tensors; no code is run)")
    group.add_argument("--precision", choices=get_args(Precision), help="default: the target's first")
    group.add_argument("--method", choices=("rtn", "k_quant", "hqq", "gptq"), default="k_quant")
    group.add_argument("--block-size", type=int, choices=(32, 64, 128), default=32)
    group.add_argument("--symmetric", action=argparse.BooleanOptionalAction, help="default: as usual for the method")
    finer = "share (0..1) of the weights that may keep 8 bits, where four hurt most on the task"
    group.add_argument("--int8-share", type=float, default=0.0, metavar="S", help=finer)
    tried = "try methods, block sizes and 8-bit layers for so long, and take the knee"
    group.add_argument("--sweep", type=float, metavar="SECONDS", help=tried)


def _adapters(given: list[str]) -> dict[str, Path]:
    """``TASK=FOLDER`` entries."""
    folders: dict[str, Path] = {}
    for entry in given:
        name, equals, folder = entry.partition("=")
        if not equals or not folder or name in folders:
            raise RefusedError("export.usage", f"--adapter takes TASK=FOLDER, once a task, not {entry!r}")
        folders[name] = Path(folder)
    return folders


def _add_shrinking(group: Any) -> None:
    group.add_argument(
        "--drop-layers", type=int, default=0, metavar="N", help="take out the layers the task needs least"
    )
    group.add_argument("--distil-into", metavar="CONFIG", help="teach a smaller network: half-width, …, or a JSON file")
    group.add_argument("--train-on", type=Path, metavar="FILE.jsonl", help="events to measure and to train with")
    group.add_argument("--train-minutes", type=float, default=10.0, metavar="M")
    group.add_argument("--train-steps", type=int, metavar="N", help="instead of minutes: exactly so many")


def _add_graph(group: Any) -> None:
    files: Any = {"type": Path, "nargs": "+", "action": "extend", "default": [], "metavar": "FILE"}
    kept = "prune the head to the tokens of these texts (UTF-8 or .jsonl), every byte and what the tasks answer with"
    group.add_argument("--vocab-from", help=kept, **files)
    group.add_argument("--vocab-rows", type=int, default=8192, metavar="N", help="tokens that a pruned head keeps")
    coarse = "how the table stores the other tokens' rows: int2 is half as large, and coarse"
    group.add_argument("--rare-rows", choices=("int4", "int2"), default="int4", help=coarse)
    group.add_argument("--vocab-heldout", help="measure on these texts what the pruned head can write", **files)
    group.add_argument("--kv", choices=("float32", "int8"), default="float32", help="element type of the caches")
    group.add_argument("--head", choices=("attached", "split"), default="attached", help="split: a graph of its own")
    group.add_argument(
        "--together",
        "--ragged",
        action=argparse.BooleanOptionalAction,
        help="let events share passes, and score several positions of a pass (default: where the target can)",
    )


def _add_proof(group: Any) -> None:
    chosen = "fit temperatures, and choose floors for the task's max_wrong"
    group.add_argument("--calibrate-on", action="append", default=[], metavar="[TASK=]FILE", help=chosen)
    line = "straighten a field's confidence with a rising line where that beats its temperature on held-out events"
    group.add_argument("--isotonic", action="store_true", help=line)
    group.add_argument("--evaluate-on", action="append", default=[], metavar="[TASK=]FILE", help="measure accuracy")
    group.add_argument("--quality", type=Path, metavar="FILE", help="embed figures that were measured before")
    group.add_argument("--arm64-root", type=Path, metavar="DIR", help="have an emulated Arm answer (.ci/arm64_root.sh)")
    group.add_argument("--openvino-python", type=Path, metavar="FILE", help="have OpenVINO answer in its environment")


def run_build(arguments: argparse.Namespace) -> int:
    """Build, or print the plan."""
    from export.build import Workplace, build, plan_build
    from export.plan import plan_lines
    from export.progress import best_progress
    from export.request import BuildRequest, GraphOptions, Identity, Measurement, read_quality
    from export.signing import load_signing_key
    from export.stages.witnesses import Elsewhere

    quiet_libraries()
    request = BuildRequest(
        checkpoint=arguments.checkpoint,
        tasks=tuple(arguments.task),
        identity=Identity(
            name=arguments.name or arguments.checkpoint.resolve().name.lower(),
            version=arguments.version,
            target=arguments.target,
        ),
        precision=arguments.precision or buildable_board(arguments.target).precisions[0],
        quantisation=_quantisation(arguments),
        int8_share=arguments.int8_share,
        sweep_s=arguments.sweep,
        soc=arguments.soc,
        allow_large=arguments.allow_large,
        trust=arguments.trust,
        shrinking=_shrinking(arguments),
        graph=GraphOptions(
            vocabulary=tuple(arguments.vocab_from),
            vocab_rows=arguments.vocab_rows,
            rare_rows=arguments.rare_rows,
            vocab_heldout=tuple(arguments.vocab_heldout),
            kv=arguments.kv,
            head=arguments.head,
            together=arguments.together,
        ),
        max_context_tokens=arguments.max_context,
        elsewhere=Elsewhere(arguments.arm64_root, arguments.openvino_python),
        measurement=Measurement(
            calibrate_on=_by_task(arguments.calibrate_on, arguments.task),
            evaluate_on=_by_task(arguments.evaluate_on, arguments.task),
            quality=read_quality(arguments.quality) if arguments.quality else {},
            isotonic=arguments.isotonic,
        ),
        adapters=_adapters(arguments.adapter),
    )
    place = Workplace(best_progress(), arguments.work, arguments.force)
    if arguments.dry_run:
        planned = plan_build(request, arguments.out, place)
        print(json.dumps(planned.as_dict(), indent=2) if arguments.json else "\n".join(plan_lines(planned)))
        return 0
    result = build(request, arguments.out, load_signing_key(arguments.sign_key), place)
    if arguments.json:
        timings = {timing.stage: round(timing.seconds, 3) for timing in result.timings}
        answer = {"digest": result.digest, "out": str(arguments.out), "seconds": timings, "report": result.report}
        print(json.dumps(answer, indent=2))
    else:
        print(f"{arguments.out}  {result.manifest.name} {result.manifest.version}  sha256:{result.digest}")
    return 0


def _quantisation(arguments: argparse.Namespace) -> Any:
    from export.quantisation.quantize import QuantSettings

    return QuantSettings(arguments.method, arguments.block_size, arguments.symmetric)


def _shrinking(arguments: argparse.Namespace) -> Any:
    from export.request import Shrinking

    if not arguments.drop_layers and arguments.distil_into is None:
        return None
    if arguments.drop_layers and arguments.distil_into is not None:
        raise RefusedError("export.usage", "--drop-layers or --distil-into, not both: a student drops layers itself")
    if arguments.train_on is None:
        raise RefusedError("export.usage", "--drop-layers and --distil-into need --train-on FILE.jsonl")
    budget = (None, arguments.train_steps) if arguments.train_steps else (arguments.train_minutes, None)
    return Shrinking(arguments.train_on, arguments.drop_layers, arguments.distil_into, *budget)


def _by_task(given: list[str], folders: list[Path]) -> dict[str, Path]:
    """``TASK=FILE`` entries; a bare ``FILE`` belongs to the only task."""
    from edge_agent.contract.task import load_task

    result: dict[str, Path] = {}
    for entry in given:
        name, equals, file = entry.partition("=")
        if not equals:
            name, file = only([load_task(folder / "task.yaml").name for folder in folders]), entry
        result[name] = Path(file)
    return result


def only(names: Sequence[str]) -> str:
    """The one task there is.

    Raises:
        RefusedError: ``export.usage`` where there are several.
    """
    if len(names) != 1:
        raise RefusedError("export.usage", f"there are several tasks ({', '.join(names)}): name one")
    return names[0]


def quiet_libraries() -> None:
    """Keep other libraries' chatter off the terminal."""
    import logging

    # onnxruntime's quantiser configures the root logger for INFO when it is imported.
    import onnxruntime.quantization.matmul_nbits_quantizer  # noqa: F401 - for that side effect, once

    logging.getLogger().setLevel(logging.WARNING)
