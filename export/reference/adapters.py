"""LoRA adapters of the reference model, for the worked example of docs/specialists.md: real ones, trained in minutes.

Run ``python -m export.reference.adapters fluids --task docs/examples/specialists/fluids --out /tmp/fluids``.

The base is frozen with the INT4 weights that the device will have, so that the adapter learns beside them. What comes
out is PEFT's format, which `edge-export build --adapter` reads; PEFT itself is not needed.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from edge_agent.contract.task import TaskSpec, load_task
from edge_agent.errors import EdgeError
from export.checkpoint.model import load_model
from export.checkpoint.peft import CONFIG_NAME, WEIGHTS_NAME
from export.checkpoint.source import Checkpoint, open_checkpoint
from export.reference.bundle_build import CHECKPOINT
from export.reference.generator import LabelledEvent, generate
from export.smaller.lessons import Lesson, LessonWriter, Row
from export.smaller.recovery import INT4_NEVER, Taught, Training, teach
from export.smaller.rounding import round_to_int4

log = logging.getLogger(__name__)

RANK, ALPHA = 8, 16
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATE = 2e-3
EVENTS = 12_000
FLUIDS = frozenset({"hydraulic", "pneumatic"})


def fluids(labelled: LabelledEvent) -> dict[str, Any] | None:
    """The specialist's answer; None where the event is not its own."""
    decision = labelled.decision
    if decision["category"] not in FLUIDS:
        return None
    return {name: decision[name] for name in ("severity", "action", "component")}


def interlock(labelled: LabelledEvent) -> dict[str, Any]:
    """The check's answer."""
    return {"danger": labelled.decision["action"] == "stop"}


ANSWERS: dict[str, Callable[[LabelledEvent], dict[str, Any] | None]] = {"fluids": fluids, "interlock": interlock}


class LowRankLinear(nn.Module):
    """A frozen projection with a low-rank product beside it.

    Args:
        base: the projection.
        generator: of the first weights.
    """

    def __init__(self, base: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        scale = base.in_features**-0.5
        self.down = nn.Parameter(torch.randn((RANK, base.in_features), generator=generator) * scale)  # (rank, inputs)
        self.up = nn.Parameter(torch.zeros((base.out_features, RANK)))  # (outputs, rank): nothing is added at first

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Float (…, inputs) -> (…, outputs)."""
        low = nn.functional.linear(states, self.down)
        product: torch.Tensor = self.base(states) + nn.functional.linear(low, self.up) * (ALPHA / RANK)
        return product


def with_adapter(model: Any, seed: int) -> dict[str, LowRankLinear]:
    """Freeze a model as INT4 and put a product beside every projection of `MODULES`; returns them by module name."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 2:
            parameter.data = round_to_int4(parameter.data)
    found: dict[str, LowRankLinear] = {}
    for name, module in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        if own in MODULES and isinstance(module, nn.Linear):
            found[name] = LowRankLinear(module, generator)
            setattr(model.get_submodule(parent), own, found[name])
    return found


def lessons_of(checkpoint: Checkpoint, task: TaskSpec, count: int, seed: int) -> list[Lesson]:
    """Lessons from the first ``count`` events of the training split that are the task's own."""
    writer = LessonWriter(checkpoint, task)
    found = ((labelled, ANSWERS[task.name](labelled)) for labelled in generate("train", seed))
    own = islice(((labelled, answer) for labelled, answer in found if answer is not None), count)
    return [writer.lesson(Row(labelled.event, answer), answer) for labelled, answer in own]


def train_adapter(checkpoint: Checkpoint, task: TaskSpec, training: Training, count: int, folder: Path) -> Taught:
    """Train one adapter and write it as PEFT would.

    Args:
        checkpoint: the base.
        task: ``fluids`` or ``interlock``.
        training: budget, rate and seed.
        count: events to learn from.
        folder: receives ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        EdgeError: what `export.smaller.recovery.teach` raises.
    """
    model = load_model(checkpoint)
    products = with_adapter(model, training.seed)
    folder.mkdir(parents=True, exist_ok=True)
    lessons = lessons_of(checkpoint, task, count, training.seed)
    with TemporaryDirectory() as work:
        taught = teach(model, None, lessons, training, Path(work), lambda text: log.info("%s", text))
    tensors = {}
    for name, product in products.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = product.down.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = product.up.detach().contiguous()
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "target_modules": list(MODULES),
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return taught


def main(argv: list[str] | None = None) -> int:
    """Command line (see the module's docstring)."""
    parser = argparse.ArgumentParser(description="Train a LoRA adapter of the reference model.")
    parser.add_argument("name", choices=sorted(ANSWERS))
    parser.add_argument("--task", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--events", type=int, default=EVENTS)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    training = Training(minutes=None, steps=arguments.steps, peak_rate=RATE, int4_from=INT4_NEVER)
    try:
        task = load_task(arguments.task / "task.yaml")
        taught = train_adapter(open_checkpoint(CHECKPOINT), task, training, arguments.events, arguments.out)
    except EdgeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    found = {"before": taught.before.as_dict(), "after": taught.after.as_dict(), "kept": taught.kept}
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
