"""The task of the decision benchmark: the reference task behind an instruction of a realistic length.

A model of general training wants to be told what to do, so a real prefix has some 250 tokens. The fields, their values
and the event lines are the reference task's own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deploy.demo.events import EventStream
from edge_agent.contract.event import Event
from edge_agent.contract.task import TaskSpec, load_task
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.prompt import event_prompt
from edge_agent.runtime.signed_bundle import load_trusted_keys, open_signed_bundle
from tests.bench.cache import cached, files_digest
from tests.bench.made import HELDOUT, REFERENCE

INSTRUCTION = """\
Triage the factory event and answer with one line of JSON: five fields, in this order.
category: the kind of fault. Take the cause that the text names, not the place where it was seen.
severity: info for tests, low for wear, medium for less output, high for standstill, critical for danger.
action: log, monitor, schedule a repair, inspect soon, call now, or stop.
escalate: true when a person must look at it in this shift.
component: the part to look at first; unknown if none is named.
"""


DEADLINE_S = 60.0


@dataclass(frozen=True)
class Prompt:
    """One event as every engine gets it.

    Args:
        event: as the machine sent it.
        text: the whole prompt, prefix included.
        ids: the same in tokens, as the device feeds them.
        decision: what the trained reference model answers; None: nobody asked it.
    """

    event: Event
    text: str
    ids: list[int]
    decision: dict[str, Any] | None = None


def decision_task() -> Path:
    """Folder of the task with the long prefix, as ``edge-export build --task`` takes it."""
    source = REFERENCE / "task" / "task.yaml"

    def make(folder: Path) -> None:
        (folder / source.name).write_text(with_long_prefix(source.read_text("utf-8")), "utf-8")

    return cached("decision-task", {"task": files_digest(source), "code": files_digest(Path(__file__))}, make)


def with_long_prefix(reference: str) -> str:
    """The YAML of the reference task, with `INSTRUCTION` as its prefix."""
    task = yaml.safe_load(reference)
    task["prompt"]["prefix"] = INSTRUCTION
    return str(yaml.safe_dump(task, sort_keys=False, allow_unicode=True))


def heldout_events(count: int) -> list[Event]:
    """The first held-out events, in file order, each of another machine; fewer where there are not so many."""
    return [json.loads(line)["event"] for line in HELDOUT.read_text("utf-8").splitlines()[:count]]


def plant_events(count: int) -> list[Event]:
    """Events of the demo's plant, whose nine machines report again and again."""
    plant = EventStream(seed=7)
    return [plant.next("steady") for _ in range(count)]


def prompts(task: TaskSpec, checkpoint: Path, events: Sequence[Event]) -> list[Prompt]:
    """Events as every engine reads them, none cut; one that reads like an earlier one is left out.

    Args:
        task: says how an event becomes text.
        checkpoint: Hugging Face folder of the model.
        events: as the machines sent them.

    Raises:
        ValueError: the task would cut one of them.
    """
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    encoder = TextEncoder(checkpoint / "tokenizer.json", config["vocab_size"])
    prefix = encoder.encode(task.prompt.prefix)
    found: dict[str, Prompt] = {}
    for event in events:
        text = task.prompt.prefix + task.render(event)
        prompt = event_prompt(task, event, encoder.encode)
        if len(encoder.encode(task.render(event))) != len(prompt.ids):
            raise ValueError(f"the task's limit of {task.limits.max_prompt_tokens} tokens cuts {event}")
        found.setdefault(text, Prompt(event, text, [*prefix, *prompt.ids]))
    return list(found.values())


def trained_decisions(events: Sequence[Event]) -> list[dict[str, Any]]:
    """What the reference model of this repository answers.

    Raises:
        EdgeError: as `Engine.decide`.
    """
    bundle = open_signed_bundle(REFERENCE / "bundle", load_trusted_keys([]))
    engine = Engine(bundle)
    (task,) = engine.tasks
    return [engine.decide(task, event, deadline_s=DEADLINE_S).decision for event in events]


def load_decision_task(folder: Path) -> TaskSpec:
    """The task in a folder that `decision_task` or the reference holds."""
    return load_task(folder / "task.yaml")
