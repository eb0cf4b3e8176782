"""A bundle as a backend of `export.proof.evaluate`: the device's own engine, or the oracle."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from edge_agent.contract.event import Event
from edge_agent.contract.manifest import read_manifest
from edge_agent.contract.task import TaskSpec
from edge_agent.errors import PermanentError
from edge_agent.runtime.adapter import task_adapter
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.engine import Engine
from export.proof.calibrate import CALIBRATION_NAME
from export.proof.evaluate import Decide, Outcome, greedy_backend
from export.proof.greedy import GreedyDecoder

THREADS = 2
DEADLINE_S = 60.0
"""Quality is measured here, not speed: a busy build machine must not turn a right answer into a missed deadline."""


@contextlib.contextmanager
def bundle_backend(bundle: Path, task: TaskSpec, *, oracle: bool = False) -> Iterator[Decide]:
    """Open a bundle for measuring.

    Args:
        bundle: its directory. It is the user's own, so its signature is not asked for; its files are hashed.
        task: the task to decide.
        oracle: whether the slow reference decoder answers instead of the engine.

    Raises:
        EdgeError: ``bundle.*``.
    """
    manifest, digest = read_manifest(bundle)
    verified = open_installed_bundle(bundle, digest)
    if oracle:
        model = manifest.model
        adapter = task_adapter(bundle, model, task.name)
        decoder = GreedyDecoder(bundle / model.decoder, bundle / model.tokenizer, model, THREADS, adapter)
        yield greedy_backend(decoder, task, read_temperatures(bundle, task.name))
        return
    engine = Engine(verified, THREADS)

    def decide(event: Event) -> Outcome:
        answer = engine.decide(task.name, event, deadline_s=DEADLINE_S)
        return Outcome(answer.decision, answer.confidence, bool(answer.guards))

    yield decide


def read_temperatures(bundle: Path, task: str) -> dict[str, float]:
    """Temperatures of a task, empty when the bundle is not calibrated.

    Raises:
        PermanentError: ``bundle.unsupported``.
    """
    path = bundle / "tasks" / task / CALIBRATION_NAME
    if not path.is_file():
        return {}
    try:
        parsed = json.loads(path.read_text("utf-8"))
        return {str(name): float(value) for name, value in parsed["temperature"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PermanentError("bundle.unsupported", f"{CALIBRATION_NAME} of {task!r} cannot be read: {error}") from error
