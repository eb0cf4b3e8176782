"""From the device's unsure answer to one decision on the outbox: real spool, real server, fake model."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_agent.answering import Answering, Step
from edge_agent.contract.event import Event
from edge_agent.contract.messages import decision_id, now_ms
from edge_agent.contract.topics import NodeTopics
from edge_agent.errors import EdgeError, PermanentError
from edge_agent.escalating import Escalating
from edge_agent.runtime.answer import Answer, WorkerFacts
from edge_agent.runtime.serving import ServingWorker
from edge_agent.settings import EscalationSettings, NodeSettings, Settings, SpoolSettings, WorkerSettings, load_settings
from edge_agent.uplink.records import Acceptance, Accepted, Duplicate
from edge_agent.uplink.spool import Spool
from tests.fakes.bundles import bundle_of_task
from tests.fakes.chat_server import ChatServer, Turn
from tests.fakes.escalations import GOOD, GUESS, TASK_YAML, FakeClock
from tests.fakes.mqtt_peer import wait_until

TOPICS = NodeTopics("plant1", "gw1")
SURE = Answer(
    decision=GUESS,
    confidence=dict.fromkeys(GUESS, 0.99),
    route="device",
    unsure_fields=(),
    guards=(),
    truncated=False,
    passes=1,
    tokens_out=3,
    latency_ms=1.0,
)
UNSURE = Answer(**{**SURE.as_dict(), "route": "abstained", "unsure_fields": ("severity",)})


class OneAnswer:
    """A worker that always gives the same answer."""

    alive = True
    pid = None

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def start(self) -> WorkerFacts:
        return WorkerFacts(0.1, 1, ("CPUExecutionProvider",), ("triage",), {"triage": 3}, 1)

    def decide(self, task: str, event: Event, deadline_s: float) -> Answer:
        return self._answer

    def decide_many(self, task: str, events: Sequence[Event], deadline_s: float) -> list[Answer | EdgeError]:
        return [self._answer for _ in events]

    def stop(self) -> None:
        pass


class Bench:
    """The agent without a broker; `restart` is a new process on the same disk."""

    def __init__(self, directory: Path, *, answer: Answer = UNSURE, yaml: str = TASK_YAML, **settings: Any) -> None:
        self._path = directory / "spool.sqlite"
        self._settings = EscalationSettings.model_validate(settings)
        self.clock = FakeClock()
        self.serving = ServingWorker(WorkerSettings(), lambda _bundle, _digest: OneAnswer(answer))
        bundle, self.digest = bundle_of_task(directory / f"bundle-{len(list(directory.iterdir()))}", yaml)
        self.serving.exchange(bundle, self.digest)
        self._open()

    def _open(self) -> None:
        self.spool = Spool(self._path, SpoolSettings())
        self.escalating = Escalating(
            self.spool, self._settings, NodeSettings(), TOPICS, lambda _fault: None, clock=self.clock
        )
        self.answering = Answering(
            self.spool, self.serving, NodeSettings(), TOPICS, lambda: False, escalation=self.escalating
        )

    def restart(self) -> None:
        self.close()
        self._open()

    def close(self) -> None:
        self.escalating.escalator.stop()
        self.spool.close()

    def take(self, event_id: str = "e-1", **fields: Any) -> Acceptance:
        event = {"id": event_id, "text": "oil low", "code": "E2", **fields}
        return self.spool.accept("triage", event_id, json.dumps(event).encode(), "normal", now_ms())

    def answer(self, event_id: str = "e-1", **fields: Any) -> None:
        assert self.take(event_id, **fields) is Accepted
        assert self.answering.step() is Step.ANSWERED

    def decisions(self) -> list[dict[str, Any]]:
        sent = [queued.message for queued in self.spool.pending(100)]
        return [json.loads(message.payload) for message in sent if "_edgeai" in message.topic]

    def ends(self, count: int = 1) -> list[tuple[str, str]]:
        wait_until(lambda: len(self.decisions()) >= count)
        return [(d["route"], d["escalation"]["outcome"]) for d in self.decisions()]


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer(json.dumps(GOOD)) as one:
        yield one


@pytest.fixture
def asking(tmp_path: Path, server: ChatServer) -> Iterator[Bench]:
    bench = Bench(tmp_path, base_url=server.url, model="large")
    yield bench
    bench.close()


def test_an_unsure_answer_is_asked_about_and_published_once_under_the_devices_id(
    asking: Bench, server: ChatServer
) -> None:
    asking.answer()
    assert asking.decisions() == []
    assert asking.take() is Duplicate, "a redelivery while it is asked about"
    asking.escalating.escalator.start()
    assert asking.ends() == [("escalated", "answered")]
    [decision] = asking.decisions()
    assert decision["decision"] == GOOD
    assert decision["decision_id"] == decision_id("triage", "e-1", asking.digest)
    assert decision["escalation"]["model"] == "large"
    assert server.asked[0].user == {"event": {"text": "oil low"}}
    counts = asking.spool.counts()
    assert (counts.escalations_pending, counts.escalations, counts.inbox) == (0, {"answered": 1}, 0)
    assert asking.take() is Duplicate, "and after"


def test_the_loop_answers_the_next_event_while_the_server_keeps_one_waiting(asking: Bench, server: ChatServer) -> None:
    release = threading.Event()
    server.next(Turn(wait_for=release, always=True))
    asking.escalating.escalator.start()
    for number in range(5):
        asking.answer(f"e-{number}")
    wait_until(lambda: server.asked)
    assert asking.spool.counts().escalations_pending == 5
    release.set()
    assert asking.ends(5) == [("escalated", "answered")] * 5


def test_a_sure_answer_and_a_task_without_the_section_look_as_they_always_did(tmp_path: Path) -> None:
    silent = TASK_YAML[: TASK_YAML.index("escalation:")]
    for number, (answer, yaml) in enumerate([(SURE, TASK_YAML), (UNSURE, silent)]):
        directory = tmp_path / str(number)
        directory.mkdir()
        bench = Bench(directory, answer=answer, yaml=yaml, base_url="http://127.0.0.1:9/v1", model="large")
        bench.answer()
        [decision] = bench.decisions()
        assert "escalation" not in decision
        assert bench.spool.counts().escalations == {}
        bench.close()


@pytest.mark.parametrize(
    ("settings", "fields", "outcome"),
    [
        ({}, {}, "not_configured"),
        ({"mqtt": True}, {}, "not_configured"),
        ({"base_url": "http://127.0.0.1:9/v1", "model": "m"}, {"text": None}, "nothing_to_share"),
    ],
)
def test_what_cannot_be_asked_is_published_at_once_with_the_reason(
    tmp_path: Path, settings: dict[str, Any], fields: dict[str, Any], outcome: str
) -> None:
    bench = Bench(tmp_path, **settings)
    bench.answer(**fields)
    assert bench.ends() == [("abstained", outcome)]
    assert bench.spool.counts().escalations == {outcome: 1}
    bench.close()


def test_beyond_the_budget_the_best_guess_is_published_also_after_a_restart(tmp_path: Path) -> None:
    yaml = TASK_YAML.replace("timeout_s: 30", "budget_per_hour: 2")
    bench = Bench(tmp_path, yaml=yaml, base_url="http://127.0.0.1:9/v1", model="m")
    for number in range(2):
        bench.answer(f"e-{number}")
    assert bench.decisions() == []
    bench.restart()
    bench.clock.power_cut()
    bench.answer("e-2")
    assert bench.ends() == [("abstained", "over_budget")]
    bench.clock.pass_ms(30 * 60 * 1000)
    bench.answer("e-3")
    assert len(bench.decisions()) == 1, "half an hour gives one of two back"
    bench.answer("e-4")
    assert len(bench.decisions()) == 2
    bench.close()


def test_beyond_the_backlog_the_best_guess_is_published_and_no_budget_is_spent(tmp_path: Path) -> None:
    bench = Bench(tmp_path, base_url="http://127.0.0.1:9/v1", model="m", pending_max=1)
    bench.answer("e-0")
    before = bench.spool.escalations.budget("triage")
    bench.answer("e-1")
    assert bench.ends() == [("abstained", "backlog_full")]
    assert bench.spool.escalations.budget("triage") == before
    bench.close()


def test_what_waited_at_a_crash_is_asked_again_after_the_start(tmp_path: Path, server: ChatServer) -> None:
    bench = Bench(tmp_path, base_url=server.url, model="large")
    bench.answer()
    bench.restart()
    bench.escalating.escalator.start()
    assert bench.ends() == [("escalated", "answered")]
    bench.close()


def test_what_waited_at_a_crash_and_is_overdue_is_given_up_after_the_start(tmp_path: Path, server: ChatServer) -> None:
    bench = Bench(tmp_path, base_url=server.url, model="large")
    bench.answer()
    bench.restart()
    bench.clock.pass_ms(30_000)
    bench.escalating.escalator.start()
    assert bench.ends() == [("abstained", "timed_out")]
    assert not server.asked
    bench.close()


def test_an_escalation_that_this_version_cannot_read_becomes_a_dead_letter_and_holds_up_nothing(
    tmp_path: Path, server: ChatServer
) -> None:
    bench = Bench(tmp_path, base_url=server.url, model="large")
    bench.answer("e-0")
    bench.answer("e-1")
    with sqlite3.connect(tmp_path / "spool.sqlite") as db:
        db.execute("""UPDATE escalations SET spec = '{"format": 2}' WHERE event_id = 'e-0'""")
    db.close()
    bench.escalating.escalator.start()
    assert bench.ends() == [("escalated", "answered")]
    wait_until(lambda: bench.spool.counts().escalations_pending == 0)
    [letter] = bench.spool.dead_letters()
    assert (letter.event_id, letter.code) == ("e-0", "escalation.unreadable")
    assert bench.take("e-0") is Duplicate
    assert bench.spool.requeue(letter.dead_letter_id) is Accepted
    bench.close()


def test_an_update_of_the_task_does_not_change_what_a_pending_answer_is_held_against(
    tmp_path: Path, server: ChatServer
) -> None:
    bench = Bench(tmp_path, base_url=server.url, model="large")
    bench.answer(code="FIRE")
    bundle, digest = bundle_of_task(tmp_path / "newer", "\n".join(TASK_YAML.replace("stop", "halt").splitlines()))
    bench.serving.exchange(bundle, digest)
    bench.escalating.escalator.start()
    assert bench.ends() == [("escalated", "answered")]
    [decision] = bench.decisions()
    assert decision["decision"] == {**GOOD, "severity": "high"}
    assert (decision["guards"], decision["model"]["digest"]) == (["fire_is_high"], bench.digest)
    bench.close()


def test_the_sites_cap_shortens_a_tasks_timeout(tmp_path: Path) -> None:
    bench = Bench(tmp_path, base_url="http://127.0.0.1:9/v1", model="m", timeout_max_s=2.5)
    bench.answer()
    assert [row.timeout_ms for row in bench.spool.escalations.waiting()] == [2500]
    bench.close()


def test_over_mqtt_the_question_is_in_the_outbox_in_the_same_transaction_and_never_a_decisions_number(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, yaml=TASK_YAML.replace("to: http", "to: mqtt"), mqtt=True)
    bench.answer()
    [queued] = bench.spool.pending(10)
    identity = decision_id("triage", "e-1", bench.digest)
    assert queued.message.topic == f"edge/v1/plant1/gw1/escalations/triage/{identity}"
    assert queued.message.klass == "alarm"
    question = json.loads(queued.message.payload)
    assert question["event"] == {"text": "oil low"}
    assert TOPICS.answered(question["answer_topic"]) == ("triage", identity)
    bench.escalating.escalator.take_answer("triage", identity, json.dumps({"decision": GOOD}).encode())
    assert bench.ends() == [("escalated", "answered")]
    assert [q.message.klass for q in bench.spool.pending(10)] == ["decision"], "nobody needs the question any more"
    bench.close()


# ---- settings


def settings(tmp_path: Path, text: str) -> Settings:
    (tmp_path / "config.toml").write_text(f"[escalation]\n{text}\n")
    return load_settings(tmp_path / "config.toml")


def test_by_default_nobody_is_asked() -> None:
    section = Settings().escalation
    assert (section.base_url, section.mqtt) == (None, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('base_url = "https://llm.example/v1"', "go together"),
        ('model = "m"', "go together"),
        ('api_key_file = "/k"', "need base_url"),
        ('base_url = "ftp://llm.example"\nmodel = "m"', "must be http"),
        ('base_url = "https://user:pw@llm.example"\nmodel = "m"', "without credentials"),
        ('base_url = "https://llm.example:port"\nmodel = "m"', "malformed"),
        ('base_url = "https://"\nmodel = "m"', "must be http"),
        ('base_url = "https://llm.example/v1?key=pw"\nmodel = "m"', "query"),
        ('base_url = "https://llm.example/v 1"\nmodel = "m"', "must be http"),
        ('base_url = "https://llm.example/v1\\r\\nX: 1"\nmodel = "m"', "must be http"),
        ('base_url = "https://lüm.example/v1"\nmodel = "m"', "ASCII"),
        ('base_url = "http://llm.example/v1"\nmodel = "m"\napi_key_file = "/k"', "everyone on the line"),
        ("concurrency = 0", "greater than or equal to 1"),
        ('api_key = "sk"', "Extra inputs"),
    ],
)
def test_a_server_that_is_not_whole_or_not_safe_is_refused_at_the_start(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(PermanentError, match=said) as caught:
        settings(tmp_path, text)
    assert caught.value.code == "settings.invalid"
    assert "pw" not in str(caught.value)


def test_a_key_may_cross_the_loopback_without_tls(tmp_path: Path) -> None:
    text = 'base_url = "http://127.0.0.1:8080/v1"\nmodel = "m"\napi_key_file = "/k"'
    assert settings(tmp_path, text).escalation.api_key_file == Path("/k")


def test_a_fault_is_an_edge_error_with_a_code_wherever_it_ends_up(asking: Bench, server: ChatServer) -> None:
    server.next(Turn(status=404))
    asking.answer()
    asking.escalating.escalator.start()
    assert asking.ends() == [("abstained", "failed")]
    assert asking.decisions()[0]["escalation"]["reason"] == "escalation.http_error"
    assert issubclass(PermanentError, EdgeError)


def test_no_question_is_spent_on_an_answer_below_its_lowest_floor(tmp_path: Path, server: ChatServer) -> None:
    hopeless = Answer(**{**UNSURE.as_dict(), "hopeless_fields": ("severity",)})
    bench = Bench(tmp_path, answer=hopeless, base_url=server.url, model="large")
    bench.answer()
    [decision] = bench.decisions()
    assert (decision["route"], decision["unsure_fields"]) == ("abstained", ["severity"])
    assert (bench.spool.counts().escalations_pending, server.asked) == (0, [])
    bench.close()
