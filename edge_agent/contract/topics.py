"""MQTT topic names (contract v1). The only place where a topic is spelled."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edge_agent.errors import PermanentError

_LEVEL = re.compile(r"^[^/+#\x00-\x1f$][^/+#\x00-\x1f]{0,63}$")
_PLACEHOLDER = re.compile(r"\{([a-z]+)\}")


def check_level(value: str, what: str) -> str:
    """One topic level: no wildcard, no slash, no control character.

    Raises:
        PermanentError: ``topic.invalid``.
    """
    if not _LEVEL.match(value):
        raise PermanentError("topic.invalid", f"{what} {value!r} cannot be an MQTT topic level")
    return value


@dataclass(frozen=True)
class NodeTopics:
    """Topics of one node, ``edge/v1/<site>/<node>/…``."""

    site: str
    node: str

    def __post_init__(self) -> None:
        check_level(self.site, "site")
        check_level(self.node, "node")

    @property
    def base(self) -> str:
        """Common prefix of the node's topics."""
        return f"edge/v1/{self.site}/{self.node}"

    @property
    def status(self) -> str:
        """Birth and death certificate (retained)."""
        return f"{self.base}/status"

    @property
    def meta(self) -> str:
        """What the node is and can do (retained)."""
        return f"{self.base}/meta"

    @property
    def model_desired(self) -> str:
        """Signed order: which release to run (retained)."""
        return f"{self.base}/model/desired"

    @property
    def model_reported(self) -> str:
        """Where the node is on the way there (retained)."""
        return f"{self.base}/model/reported"

    @property
    def events_filter(self) -> str:
        """Subscription filter for ``events/<task>``."""
        return f"{self.base}/events/+"

    @property
    def deadletter(self) -> str:
        """Where an event that cannot be decided is reported (not retained, QoS 1)."""
        return f"{self.base}/deadletter"

    def events(self, task: str) -> str:
        """Events of ``task`` for this node."""
        return f"{self.base}/events/{check_level(task, 'task')}"

    def tele(self, kind: str) -> str:
        """``tele/hw``, ``tele/inference`` or ``tele/queue``."""
        return f"{self.base}/tele/{kind}"

    def alarm(self, kind: str) -> str:
        """A standing alarm (retained; an empty payload clears it)."""
        return f"{self.base}/alarm/{check_level(kind, 'alarm')}"

    def escalation(self, task: str, decision_id: str) -> str:
        """A question about an event of ``task`` to a person or a service (not retained, QoS 1)."""
        return f"{self.base}/escalations/{check_level(task, 'task')}/{check_level(decision_id, 'decision id')}"

    def escalation_answer(self, task: str, decision_id: str) -> str:
        """Where the answer to that question is expected."""
        return f"{self.base}/escalations-answers/{check_level(task, 'task')}/{check_level(decision_id, 'decision id')}"

    @property
    def escalation_answers_filter(self) -> str:
        """Subscription filter for answers."""
        return f"{self.base}/escalations-answers/+/+"

    def answered(self, topic: str) -> tuple[str, str] | None:
        """Task and decision id of an answer's topic of this node, else None."""
        prefix = f"{self.base}/escalations-answers/"
        task, _, decision_id = topic.removeprefix(prefix).partition("/")
        is_answer = topic.startswith(prefix) and task and decision_id and "/" not in decision_id
        return (task, decision_id) if is_answer else None

    def task_of(self, topic: str) -> str | None:
        """The task of an ``events/<task>`` topic of this node, else None."""
        prefix = f"{self.base}/events/"
        task = topic.removeprefix(prefix)
        return task if topic.startswith(prefix) and task and "/" not in task else None


def decision_topic(template: str, levels: dict[str, str]) -> str:
    """Fill a Unified Namespace template such as ``{enterprise}/{site}/{area}/{line}/{cell}/_edgeai/{task}``.

    Raises:
        PermanentError: ``topic.invalid`` for an unknown placeholder or a value that is not a topic level.
    """

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in levels:
            raise PermanentError("topic.invalid", f"unknown placeholder {{{name}}} in topic template")
        return check_level(levels[name], name)

    return _PLACEHOLDER.sub(fill, template)
