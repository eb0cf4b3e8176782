"""What an engine did with the events of a round, and the order in which the engines take their turns."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.cache import ROOT
from tests.bench.decision_task import Prompt
from tests.bench.measured_run import CommandFailedError

_TAIL_CHARS = 2000
_RUN_LIMIT_S = 900.0


@dataclass(frozen=True)
class Job:
    """What every engine is given.

    Args:
        task: name of the task, as our bundle has it.
        warm: events that are answered first and not measured.
        measured: events that are answered one at a time.
        backlog: events that are all waiting.
        history: events that an engine which learns from events has answered before.
        prefix_tokens: tokens that all prompts begin with.
        max_answer_tokens: after which an engine has lost its way.
        gbnf: the answer's grammar for llama.cpp.
        regex: the same for onnxruntime-genai.
        threads: of every engine.
    """

    task: str
    warm: Sequence[Prompt]
    measured: Sequence[Prompt]
    backlog: Sequence[Prompt]
    history: Sequence[Prompt]
    prefix_tokens: int
    max_answer_tokens: int
    gbnf: str
    regex: str
    threads: int

    @property
    def context_tokens(self) -> int:
        """Room for the longest prompt and the longest answer."""
        longest = max(len(prompt.ids) for prompt in (*self.warm, *self.measured, *self.backlog))
        return longest + self.max_answer_tokens

    def as_json(self) -> str:
        """For the engines' programs."""
        return json.dumps({**asdict(self), "context_tokens": self.context_tokens})


@dataclass(frozen=True)
class Answered:
    """One event, answered.

    Args:
        latency_ms: from the event at hand to the answer at hand.
        prompt_ms: of it, reading the prompt, as far as the engine tells; 0: it does not.
        generate_ms: of it, from the answer's first token to its last, likewise.
        prompt_tokens: that were read anew, likewise.
        tokens: of the answer, as generated.
        text: the answer.
    """

    latency_ms: float
    prompt_ms: float
    generate_ms: float
    prompt_tokens: int
    tokens: int
    text: str


@dataclass(frozen=True)
class Backlog:
    """Events that were all waiting.

    Args:
        seconds: until the last was answered.
        tokens: of each answer.
        token_ms: of the machine's time, that one more token of one answer takes; 0 where nothing has to be corrected.
    """

    seconds: float
    tokens: tuple[int, ...]
    token_ms: float = 0.0

    @property
    def ms_each(self) -> float:
        """Mean time of a decision."""
        return 1000 * self.seconds / len(self.tokens)


@dataclass(frozen=True)
class EngineRun:
    """One fresh process of an engine.

    Args:
        first_decision_s: from the process's start to its first answer.
        peak_rss_bytes: the kernel's high-water mark after the measured events, before the backlog.
        answers: to the measured events, in order.
        processor_s: that the measured events took on all cores of the machine together; 0: not asked.
        backlog: None: this run had none.
        prompts_differ: prompts that the engine's own tokenizer spells otherwise.
        plain_token_ms: of a token without a grammar; None: not asked.
        repeats_per_s: decisions per second on events that it has answered before; None: it keeps no answers.
    """

    first_decision_s: float
    peak_rss_bytes: int
    answers: tuple[Answered, ...]
    processor_s: float = 0.0
    backlog: Backlog | None = None
    prompts_differ: int = 0
    plain_token_ms: float | None = None
    repeats_per_s: float | None = None


def parse_run(printed: str) -> EngineRun:
    """The JSON that an engine's program prints last."""
    found: dict[str, Any] = json.loads(printed.strip().rpartition("\n")[2])
    backlog = found.pop("backlog", None)
    answers = tuple(Answered(**answer) for answer in found.pop("answers"))
    if backlog is not None:
        backlog = Backlog(backlog["seconds"], tuple(backlog["tokens"]), backlog.get("token_ms", 0.0))
    return EngineRun(answers=answers, backlog=backlog, **found)


def run_program(command: Sequence[str | Path], environment: Mapping[str, str]) -> EngineRun:
    """Run an engine's program in a fresh process; it is told when it was started.

    Nothing watches it meanwhile, unlike `tests.bench.measured_run`: on two cores the watcher would be felt.

    Args:
        command: prints the JSON of `parse_run` last, takes ``--spawned-at`` (`time.monotonic`, the same clock in every
            process of the machine).
        environment: of the process.

    Raises:
        CommandFailedError: it ended with another status than 0, or not at all.
    """
    words = [str(part) for part in command]
    name = Path(words[1]).name
    try:
        done = subprocess.run(
            [*words, "--spawned-at", repr(time.monotonic())],
            cwd=ROOT,
            env=dict(environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=_RUN_LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise CommandFailedError(f"{name} took more than {_RUN_LIMIT_S:g} s") from error
    if done.returncode != 0:
        raise CommandFailedError(f"{name} ended with {done.returncode}: {done.stderr[-_TAIL_CHARS:].strip()}")
    return parse_run(done.stdout)


@dataclass(frozen=True)
class Turns:
    """All rounds.

    Args:
        runs: engine -> its runs, one a round.
        failed: engine -> why it is not compared.
    """

    runs: dict[str, list[EngineRun]]
    failed: dict[str, str]


def fault_line(words: str) -> str:
    """The line that names the fault: the first that speaks of an error, else the last."""
    lines = words.strip().splitlines()
    return next((line for line in lines if "Error: " in line), lines[-1])


def take_turns(
    engines: Mapping[str, Callable[[], EngineRun]], rounds: int, check: Callable[[EngineRun], None]
) -> Turns:
    """Every engine once a round, in a fresh process each: A B C, A B C, …

    Args:
        engines: name -> a fresh process of it. One that fails leaves the turns, and the others go on.
        rounds: how often.
        check: raises `CommandFailedError` for answers that are not to be compared.
    """
    turns = Turns({name: [] for name in engines}, {})
    for _ in range(rounds):
        for name in list(turns.runs):
            try:
                run = engines[name]()
                check(run)
            except CommandFailedError as error:
                turns.failed[name] = fault_line(str(error))
                del turns.runs[name]
            else:
                turns.runs[name].append(run)
    return turns
