"""llama.cpp's server in a fresh process, and a client that asks it as a careful user would.

The prompt's text, a grammar that leaves no space to choose about, greedy sampling, the prefix kept from event to event
(``cache_prompt``), and an end at the closing brace, which saves the pass for the end token.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil

from tests.bench.attempts import Say
from tests.bench.decision_contenders import LlamaServer
from tests.bench.decision_ratios import equal_output_ms, token_ms
from tests.bench.decision_runs import Answered, Backlog, EngineRun, Job
from tests.bench.decision_task import Prompt
from tests.bench.measured_run import CommandFailedError

END = "}"
SLOTS = 4
_KIB = 1024
_CONTEXT_STEP = 256
_READY_LIMIT_S = 120.0
_POLL_S = 0.005
_ANSWER_LIMIT_S = 120.0
_TRIAL_EVENTS = 6
_PLAIN_EVENTS = 2
_PROMPTS_MIB = 8192


@dataclass(frozen=True)
class Setting:
    """A way to start the server.

    Args:
        name: for the page.
        arguments: of its command line.
    """

    name: str
    arguments: tuple[str, ...]


SETTINGS = (
    Setting("flash attention", ("--flash-attn", "on")),
    Setting("no flash attention", ("--flash-attn", "off")),
    Setting("flash attention, physical batch of 128", ("--flash-attn", "on", "--ubatch-size", "128")),
    Setting("flash attention, no polling", ("--flash-attn", "on", "--poll", "0")),
    Setting("flash attention, drafts from the context", ("--flash-attn", "on", "--spec-type", "ngram-simple")),
    Setting("flash attention, drafts from all answers", ("--flash-attn", "on", "--spec-type", "ngram-mod")),
)


def as_by_default(setting: Setting) -> Setting:
    """The same with the weights mapped, as the server does when it is not told otherwise."""
    return Setting(f"{setting.name}, mapped", (*setting.arguments, "--load-mode", "auto"))


def as_remembering(setting: Setting) -> Setting:
    """The same with the prompts of earlier events kept in memory, as the server does when it is not told otherwise."""
    return Setting(f"{setting.name}, prompts kept", (*setting.arguments, "--cache-ram", str(_PROMPTS_MIB)))


class Client:
    """One connection to a server.

    Args:
        port: on the loopback interface.
        grammar: of the answers.
        most_tokens: of an answer.
        by_ids: whether prompts are sent as tokens, because the server would spell their text otherwise.
    """

    def __init__(self, port: int, grammar: str, most_tokens: int, *, by_ids: bool = False) -> None:
        self._connection = HTTPConnection("127.0.0.1", port, timeout=_ANSWER_LIMIT_S)
        self._grammar = grammar
        self._most_tokens = most_tokens
        self.by_ids = by_ids

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def is_ready(self) -> bool:
        """Whether the server has loaded its model."""
        try:
            self._connection.request("GET", "/health")
            response = self._connection.getresponse()
            response.read()
        except (OSError, HTTPException):
            self._connection.close()
            return False
        return response.status == 200

    def differing(self, prompts: Sequence[Prompt]) -> int:
        """Prompts that the server's tokenizer spells otherwise."""
        spelled = (self._post("/tokenize", {"content": prompt.text})["tokens"] for prompt in prompts)
        return sum(found != prompt.ids for found, prompt in zip(spelled, prompts, strict=True))

    def answer(self, prompt: Prompt) -> Answered:
        """Answer one event."""
        started_s = time.perf_counter()
        found = self._complete(prompt, n_predict=self._most_tokens, grammar=self._grammar, stop=[END])
        latency_ms = 1000 * (time.perf_counter() - started_s)
        timings = found["timings"]
        return Answered(
            latency_ms=latency_ms,
            prompt_ms=timings["prompt_ms"],
            generate_ms=timings["predicted_ms"],
            prompt_tokens=timings["prompt_n"],
            tokens=timings["predicted_n"],
            text=found["content"] + END,
        )

    def plain_token_ms(self, prompt: Prompt, tokens: int) -> float:
        """Time of a token when no grammar is asked for."""
        timings = self._complete(prompt, n_predict=tokens, ignore_eos=True)["timings"]
        return float(timings["predicted_ms"] / (timings["predicted_n"] - 1))

    def _complete(self, prompt: Prompt, **options: Any) -> dict[str, Any]:
        text = prompt.ids if self.by_ids else prompt.text
        return self._post("/completion", {"prompt": text, "temperature": 0.0, "cache_prompt": True, **options})

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self._connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        found: dict[str, Any] = json.loads(self._connection.getresponse().read())
        if "error" in found:
            raise CommandFailedError(f"llama-server {path}: {found['error'].get('message', found['error'])}")
        return found


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Args:
        port: on the loopback interface.
        pid: its process.
        spawned_s: `time.monotonic` when it was started.
    """

    port: int
    pid: int
    spawned_s: float

    def client(self, job: Job) -> Client:
        """A connection of its own."""
        return Client(self.port, job.gbnf, job.max_answer_tokens)

    def peak_rss_bytes(self) -> int:
        """The kernel's high-water mark."""
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text("ascii"))
        return int(found[1]) * _KIB if found else 0

    def processor_s(self) -> float:
        """Processor time so far, of all its threads."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)


@contextmanager
def serving(peer: LlamaServer, job: Job, setting: Setting, slots: int) -> Iterator[Running]:
    """A server, started and stopped.

    Raises:
        CommandFailedError: it ended before it was ready, or was not ready in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Rounded up as the server would, and one step more: it refuses a prompt that fills its context.
    context = slots * (job.context_tokens // _CONTEXT_STEP + 2) * _CONTEXT_STEP
    command = [peer.binary, "--model", peer.gguf, "--host", "127.0.0.1", "--port", port, "--threads", job.threads]
    # Its weights are repacked as they are read. Read and not mapped, the originals do not count for its memory as well.
    command += ["--ctx-size", context, "--parallel", slots, "--cache-ram", 0, "--load-mode", "none", "--log-disable"]
    command += setting.arguments
    spawned_s = time.monotonic()
    server = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        running = Running(port, server.pid, spawned_s)
        with closing(running.client(job)) as client:
            while not client.is_ready():
                if server.poll() is not None:
                    raise CommandFailedError(f"llama-server ended with {server.returncode} ({setting.name})")
                if time.monotonic() - spawned_s > _READY_LIMIT_S:
                    raise CommandFailedError(f"llama-server was not ready after {_READY_LIMIT_S:g} s ({setting.name})")
                time.sleep(_POLL_S)
        yield running
    finally:
        server.terminate()
        server.wait()


def one_at_a_time(peer: LlamaServer, job: Job, setting: Setting) -> EngineRun:
    """A fresh server, one client, the measured events in order."""
    with serving(peer, job, setting, 1) as running, closing(running.client(job)) as client:
        # The first decision comes before the check of the tokenizer, which is ours and takes its time.
        client.answer(job.warm[0])
        first_decision_s = time.monotonic() - running.spawned_s
        differing = client.differing([*job.warm, *job.measured, *job.backlog])
        client.by_ids = differing > 0
        for prompt in job.warm:
            client.answer(prompt)
        processor_before_s = running.processor_s()
        answers = tuple(client.answer(prompt) for prompt in job.measured)
        processor_s = running.processor_s() - processor_before_s
        peak_bytes = running.peak_rss_bytes()
        tokens = round(mean(answer.tokens for answer in answers))
        plain_ms = median(client.plain_token_ms(prompt, tokens) for prompt in job.measured[:_PLAIN_EVENTS])
    return EngineRun(
        first_decision_s,
        peak_bytes,
        answers,
        processor_s=processor_s,
        prompts_differ=differing,
        plain_token_ms=plain_ms,
    )


def all_waiting(peer: LlamaServer, job: Job, setting: Setting) -> EngineRun:
    """A fresh server with `SLOTS` slots and as many clients, which take the waiting events as they become free."""
    with serving(peer, job, setting, SLOTS) as running, ExitStack() as stack:
        clients = [stack.enter_context(closing(running.client(job))) for _ in range(SLOTS)]
        by_ids = clients[0].differing([*job.warm, *job.backlog]) > 0
        for client in clients:
            client.by_ids = by_ids
        pool = stack.enter_context(ThreadPoolExecutor(SLOTS))

        def answer(prompt: Prompt) -> Answered:
            client = clients.pop()
            try:
                return client.answer(prompt)
            finally:
                clients.append(client)

        # As many at once as there are slots, so that every slot gets the prefix.
        list(pool.map(answer, job.warm[:SLOTS]))
        first_decision_s = time.monotonic() - running.spawned_s
        started_s = time.monotonic()
        answers = tuple(pool.map(answer, job.backlog))
        seconds = time.monotonic() - started_s
        peak_bytes = running.peak_rss_bytes()
    # A token's time is shared by the slots that are answered together.
    backlog = Backlog(seconds, tuple(answer.tokens for answer in answers), token_ms(answers) / SLOTS)
    return EngineRun(first_decision_s, peak_bytes, answers, backlog=backlog)


def few_events(job: Job) -> Job:
    """A job that is done in a moment."""
    return Job(**{**vars(job), "measured": job.measured[:_TRIAL_EVENTS], "backlog": ()})


def best_setting(peer: LlamaServer, job: Job, say: Say) -> tuple[Setting, dict[str, float]]:
    """Try every setting on a few events.

    Returns:
        The one that decided fastest on this machine, and each one's milliseconds a decision at equal output (with
        random weights a setting may answer in other tokens); a setting that the server refuses has none.

    Raises:
        CommandFailedError: none works.
    """
    few = few_events(job)
    found: dict[str, float] = {}
    first: tuple[Answered, ...] | None = None
    for setting in SETTINGS:
        try:
            answers = one_at_a_time(peer, few, setting).answers
        except CommandFailedError as error:
            say(f"not used: {error}")
            continue
        first = first or answers
        found[setting.name] = equal_output_ms(answers, first)
    if not found:
        raise CommandFailedError("llama-server works with none of the settings")
    fastest = min(found, key=lambda name: found[name])
    return next(setting for setting in SETTINGS if setting.name == fastest), found
