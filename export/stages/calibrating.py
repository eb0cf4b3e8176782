"""Of stage *prove*: temperatures, lines and floors, each fitted on other events than those it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from edge_agent.contract.task import GoldenExample, TaskSpec
from edge_agent.contract.thresholds import ChosenFloor, Floors, error_targets
from edge_agent.errors import EdgeError
from edge_agent.runtime.calibration import Knots
from export.pipeline import Progress
from export.proof.calibrate import (
    CALIBRATION_NAME,
    best_temperature,
    calibration_bytes,
    gather_trials,
    sureness,
)
from export.proof.evaluate import Decide
from export.proof.floors import choose_floor, halves, never, scout
from export.proof.greedy import GreedyDecoder
from export.proof.isotonic import helpful_knots
from export.proof.reliability import Pair

OpenBackend = Callable[[TaskSpec], AbstractContextManager[Decide]]
Answered = tuple[dict[str, float], dict[str, bool]]
"""(confidence by field, whether its value was right)."""


@dataclass(frozen=True)
class Fitted:
    """One task's calibration in the making.

    Args:
        task: the task.
        halves: labelled events: those that temperatures are fitted on, and those that floors are tested on.
        temperatures: by field.
        knots: by field, where temperature alone did not do.
        floors: by field with an error target; without a floor until one is chosen.
    """

    task: TaskSpec
    halves: tuple[Sequence[GoldenExample], Sequence[GoldenExample]]
    temperatures: Mapping[str, float]
    knots: Mapping[str, Knots]
    floors: Mapping[str, ChosenFloor]

    def write(self, folder: Path) -> None:
        """Write ``tasks/<task>/calibration.json`` below a folder."""
        target = folder / "tasks" / self.task.name / CALIBRATION_NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(calibration_bytes(self.temperatures, self.knots, self.floors))


def fit(
    decoder: GreedyDecoder, task: TaskSpec, rows: Sequence[GoldenExample], progress: Progress, *, isotonic: bool
) -> Fitted:
    """Fit temperatures, and lines where they are welcome and help.

    Args:
        decoder: the model that will be shipped.
        task: the task.
        rows: labelled events that the model was not trained on. A task with error targets keeps half of them back.
        progress: is told the figures.
        isotonic: whether a line may take the place of a confidence that one temperature does not straighten.
    """
    targets = error_targets(task.thresholds)
    first, second = halves(rows)
    fitting = first if targets else [*first, *second]
    trials = gather_trials(decoder, task, fitting)
    temperatures = {name: best_temperature(found) for name, found in trials.items()}
    progress.line(f"{task.name}: temperatures {temperatures} from {len(fitting)} events")
    knots: dict[str, Knots] = {}
    if isotonic:
        for name, found in trials.items():
            line = helpful_knots([sureness(trial, temperatures[name]) for trial in found])
            if line is not None:
                knots[name] = line
        progress.line(f"{task.name}: a line through counts helps {', '.join(knots) or 'no field'}")
    floors = {name: never(target) for name, target in targets.items()}
    return Fitted(task, (fitting, second), temperatures, knots, floors)


def choose_floors(fitted: Fitted, open_backend: OpenBackend, progress: Progress) -> Fitted:
    """Choose the floors of a task's error targets, on what the device's own engine answers.

    Args:
        fitted: of the bundle that ``open_backend`` opens.
        open_backend: opens the bundle for a task.
        progress: is told each floor, or what is missing for one.
    """
    targets = error_targets(fitted.task.thresholds)
    if not targets:
        return fitted
    scouts, tests = fitted.halves
    with open_backend(fitted.task) as decide:
        scouted, tested = _answers(decide, scouts), _answers(decide, tests)
    order = [field.name for field in fitted.task.output_fields]
    floors: dict[str, ChosenFloor] = {}
    for name, target in targets.items():
        # Alone, or with all that was written before it: the half that the floor is not tested on says which.
        ways = [(), tuple(order[: order.index(name) + 1])] if order.index(name) else [()]
        over = max(ways, key=lambda way: scout(_sureness(scouted, name, way), target))
        judged = _sureness(tested, name, over)
        found = choose_floor(_sureness(scouted, name, over), judged, target, (len(scouts), len(tests)))
        floors[name] = replace(found, over=over)
        progress.line(f"{fitted.task.name}: {floor_sentence(name, floors[name], judged)}")
    return replace(fitted, floors=floors)


def floor_sentence(field: str, found: ChosenFloor, tested: Sequence[Pair]) -> str:
    """What was found for one field, for people.

    Args:
        field: its name.
        found: its floor.
        tested: confidence and hit of the answers that floors were tested on.
    """
    asked = f"{field} at most {found.max_wrong:.2%} wrong (certainty {found.certainty:.0%})"
    if found.floor is not None:
        together = f" over {', '.join(found.over)}" if found.over else ""
        passing = f"{found.passed} of {found.events} events pass, {found.wrong} wrong"
        return f"{asked}: floor {found.floor:g}{together}, {passing}"
    wrong = sum(not hit for _, hit in tested)
    needed = (
        "no number of events will do: its surest values are wrong too often"
        if found.needed_events is None
        else f"at least {found.needed_events:,} labelled events are needed"
    )
    return f"{asked}: no floor keeps it, the field is always unsure; {wrong} of {len(tested)} values wrong, {needed}"


def _answers(decide: Decide, rows: Sequence[GoldenExample]) -> list[Answered]:
    """What would be published, guards included; an event that brings an error brings no answer."""
    answers: list[Answered] = []
    for row in rows:
        try:
            outcome = decide(dict(row.event))
        except EdgeError:
            continue
        hits = {name: outcome.decision[name] == value for name, value in row.decision.items()}
        answers.append((outcome.confidence, hits))
    return answers


def _sureness(answers: Sequence[Answered], name: str, over: tuple[str, ...]) -> list[Pair]:
    floors = Floors({}, {}, {name: over} if over else {})
    return [(floors.sureness(name, confidence), hits[name]) for confidence, hits in answers]
