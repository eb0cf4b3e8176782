"""The client of llama.cpp's server, against a server that speaks its protocol: what it asks for is what is compared."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.decision_contenders import LlamaServer
from tests.bench.decision_runs import Job
from tests.bench.decision_task import Prompt
from tests.bench.llama_server_decisions import SETTINGS, SLOTS, all_waiting, best_setting, one_at_a_time
from tests.bench.measured_run import CommandFailedError

SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

arguments = sys.argv[1:]
after = lambda name: arguments[arguments.index(name) + 1]
plan = json.load(open(after("--model")))
if plan["refuses"] in arguments:
    sys.exit(3)
token_ms = plan["fast_ms"] if plan["fast"] in arguments else 10.0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer({{"status": "ok"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(plan["log"], "a") as log:
            log.write(json.dumps({{**body, "path": self.path, "parallel": after("--parallel")}}) + "\\n")
        if self.path == "/tokenize":
            self.answer({{"tokens": [ord(c) + plan["shift"] for c in body["content"]]}})
        elif "grammar" in body:
            self.answer({{"content": '{{"kind":"belt"', "timings": self.timings(20)}})
        else:
            self.answer({{"content": "noise", "timings": self.timings(body["n_predict"])}})

    def timings(self, tokens):
        return {{"prompt_n": 5, "prompt_ms": 1.0, "predicted_n": tokens, "predicted_ms": token_ms * (tokens - 1)}}

    def answer(self, found):
        content = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        pass


ThreadingHTTPServer(("127.0.0.1", int(after("--port"))), Handler).serve_forever()
"""


def prompt(text: str) -> Prompt:
    return Prompt({"text": text}, text, [ord(c) for c in text])


JOB = Job(
    "t", [prompt(c) for c in "abcd"], [prompt("e"), prompt("f")], [prompt("g"), prompt("h")], [], 0, 32, "root", "", 1
)


class Peer:
    """A server of this protocol, and what it was asked."""

    def __init__(self, folder: Path, **plan: Any) -> None:
        self._log = folder / "asked.jsonl"
        (folder / "model.gguf").write_text(
            json.dumps({"log": str(self._log), "shift": 0, "refuses": "", "fast": "", "fast_ms": 1.0, **plan})
        )
        (folder / "llama-server").write_text(SERVER.format(python=sys.executable))
        (folder / "llama-server").chmod(0o755)
        self.server = LlamaServer(folder / "llama-server", folder / "model.gguf")

    def asked(self, path: str) -> list[dict[str, Any]]:
        return [found for line in self._log.read_text().splitlines() if (found := json.loads(line))["path"] == path]


def test_every_answer_is_greedy_under_the_grammar_and_ends_at_the_brace(tmp_path: Path) -> None:
    peer = Peer(tmp_path)
    found = one_at_a_time(peer.server, JOB, SETTINGS[0])
    assert [answer.text for answer in found.answers] == ['{"kind":"belt"}'] * 2
    under_grammar = [asked for asked in peer.asked("/completion") if "grammar" in asked]
    assert {asked["temperature"] for asked in under_grammar} == {0.0}
    assert all(asked["cache_prompt"] and asked["stop"] == ["}"] for asked in under_grammar)
    assert [asked["prompt"] for asked in under_grammar] == ["a", *"abcd", *"ef"]
    assert found.prompts_differ == 0
    assert found.peak_rss_bytes > 1 << 20


def test_a_token_without_a_grammar_is_timed_apart(tmp_path: Path) -> None:
    peer = Peer(tmp_path)
    assert one_at_a_time(peer.server, JOB, SETTINGS[0]).plain_token_ms == pytest.approx(10.0)
    (first, *_) = [asked for asked in peer.asked("/completion") if "grammar" not in asked]
    assert first["n_predict"] == 20
    assert first["ignore_eos"] is True


def test_prompts_that_the_server_spells_otherwise_are_sent_as_tokens(tmp_path: Path) -> None:
    peer = Peer(tmp_path, shift=1)
    assert one_at_a_time(peer.server, JOB, SETTINGS[0]).prompts_differ == 8
    measured = [asked["prompt"] for asked in peer.asked("/completion")][5:7]
    assert measured == [[ord("e")], [ord("f")]]


def test_a_backlog_goes_to_all_slots_and_every_event_is_answered(tmp_path: Path) -> None:
    peer = Peer(tmp_path)
    found = all_waiting(peer.server, JOB, SETTINGS[0])
    assert found.backlog is not None
    assert found.backlog.tokens == (20, 20)
    assert found.backlog.token_ms == pytest.approx(10.0 / SLOTS)
    assert {asked["parallel"] for asked in peer.asked("/completion")} == {str(SLOTS)}
    assert sorted(asked["prompt"] for asked in peer.asked("/completion")) == [*"abcd", *"gh"]


def test_a_setting_that_the_server_refuses_leaves_the_others(tmp_path: Path) -> None:
    said: list[str] = []
    _, tried = best_setting(Peer(tmp_path, refuses="ngram-mod").server, JOB, said.append)
    assert "flash attention, drafts from all answers" not in tried
    assert len(tried) == len(SETTINGS) - 1
    assert said == ["not used: llama-server ended with 3 (flash attention, drafts from all answers)"]


def test_a_server_that_never_starts_is_told(tmp_path: Path) -> None:
    with pytest.raises(CommandFailedError, match="none of the settings"):
        best_setting(Peer(tmp_path, refuses="--model").server, JOB, lambda line: None)
