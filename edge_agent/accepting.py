"""From bytes on a topic to a durable row of the inbox, or to a dead letter that says why not."""

from __future__ import annotations

from collections.abc import Callable

from edge_agent.contract.event import MAX_EVENT_BYTES, event_id, parse_event
from edge_agent.contract.messages import now_ms
from edge_agent.contract.task import TaskSpec
from edge_agent.errors import RefusedError
from edge_agent.log import get_logger
from edge_agent.uplink.records import Accepted
from edge_agent.uplink.spool import Spool

_log = get_logger(__name__)


class Accepting:
    """Accepts events on behalf of the uplink.

    Args:
        spool: where accepted events become durable.
        tasks: the tasks of the active bundle; empty before the first install, when every event is kept for later.
    """

    def __init__(self, spool: Spool, tasks: Callable[[], dict[str, TaskSpec]]) -> None:
        self._spool = spool
        self._tasks = tasks

    def on_event(self, task: str, payload: bytes) -> None:
        """Make one event durable; on return it may be acknowledged.

        Raises:
            RefusedError: the event is wrong and lies in the dead letters: acknowledge it.
            TransientError: ``disk.full``: do not acknowledge it. ``inbox.full``: the uplink buries and acknowledges it.
        """
        try:
            spec = self._spec(task)
            limit_bytes = spec.limits.max_event_bytes if spec else MAX_EVENT_BYTES
            identity = event_id(parse_event(payload, max_bytes=limit_bytes))
        except RefusedError as error:
            self._spool.bury(None, error, task=task, payload=payload)
            raise
        outcome = self._spool.accept(task, identity, payload, spec.priority if spec else "normal", now_ms())
        if outcome is not Accepted:
            _log.debug("event_repeated", task=task, event_id=identity)

    def _spec(self, task: str) -> TaskSpec | None:
        tasks = self._tasks()
        if tasks and task not in tasks:
            raise RefusedError("task.unknown", f"no task {task[:64]!r} in the active bundle")
        return tasks.get(task)
