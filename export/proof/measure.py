"""A bundle as a backend of `export.proof.evaluate`: the device's own engine, or the oracle."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from edge_agent.contract.event import Event
from edge_agent.contract.manifest import read_manifest
from edge_agent.contract.task import TaskSpec
from edge_agent.runtime.adapter import task_adapter
from edge_agent.runtime.bundle import open_installed_bundle
from edge_agent.runtime.calibration import Calibration, load_calibration
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
        EdgeError: ``bundle.*``, ``task.*``.
    """
    manifest, digest = read_manifest(bundle)
    verified = open_installed_bundle(bundle, digest)
    if oracle:
        model = manifest.model
        adapter = task_adapter(bundle, model, task.name)
        decoder = GreedyDecoder(bundle / model.decoder, bundle / model.tokenizer, model, THREADS, adapter)
        yield greedy_backend(decoder, task, read_calibration(bundle, task))
        return
    engine = Engine(verified, THREADS)

    def decide(event: Event) -> Outcome:
        answer = engine.decide(task.name, event, deadline_s=DEADLINE_S)
        return Outcome(answer.decision, answer.confidence, bool(answer.guards))

    yield decide


def read_calibration(bundle: Path, task: TaskSpec) -> Calibration:
    """A task's calibration, as the device reads it.

    Raises:
        PermanentError: ``task.calibration_invalid``.
    """
    path = bundle / "tasks" / task.name / CALIBRATION_NAME
    return load_calibration(path if path.is_file() else None, task)
