"""onnxruntime-genai in a fresh process, as `tests.bench.engine_decisions` runs ours.

    build/bench/ogenai-…/bin/python tests/bench/ogenai_decisions.py MODEL_FOLDER JOB.json

Runs in an environment of its own: nothing of this repository is imported. What makes it fast is used: one generator
whose cache keeps what a prompt shares with the last one (``rewind_to``), guidance with tokens that are forced taken
without sampling (``enable_ff_tokens``), greedy search, logits of the last token alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import onnxruntime
import onnxruntime_genai as og

_KIB = 1024


class Peer:
    """A loaded model with the prefix in its cache.

    Args:
        folder: as the builder wrote it.
        job: as `tests.bench.decision_runs.Job` writes it.
    """

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        config = og.Config(str(folder))
        options = {"intra_op_num_threads": job["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)
        self._tokenizer = og.Tokenizer(self._model)
        self._most = job["max_answer_tokens"]
        self._own_ids = self.differing(job["warm"]) == 0
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(do_sample=False, max_length=job["context_tokens"])
        parameters.set_guidance("regex", job["regex"], True)
        self._generator = og.Generator(self._model, parameters)
        self._last: list[int] = job["warm"][0]["ids"][: job["prefix_tokens"]]
        self._generator.append_tokens(self._last)

    def differing(self, prompts: list[dict[str, Any]]) -> int:
        """Prompts that this tokenizer spells otherwise."""
        return sum(self._tokenizer.encode(prompt["text"]).tolist() != prompt["ids"] for prompt in prompts)

    def answer(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Answer one event."""
        started_s = time.perf_counter()
        # The text, as a user would; ids only where this tokenizer would read another text than the rest.
        ids = self._tokenizer.encode(prompt["text"]).tolist() if self._own_ids else prompt["ids"]
        generator = self._generator
        # As llama.cpp does by itself: back to where this prompt parts from the last one, prefix or beyond.
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._last, ids, strict=False))
        kept = min(sum(1 for _ in alike), len(ids) - 1)
        generator.rewind_to(kept)
        generator.append_tokens(ids[kept:])
        self._last = ids
        read_s = time.perf_counter()
        generator.generate_next_token()
        first_s = time.perf_counter()
        while not generator.is_done() and generator.token_count() < len(ids) + self._most:
            generator.generate_next_token()
        generated_s = time.perf_counter()
        answer = generator.get_sequence(0)[len(ids) :]
        text = self._tokenizer.decode(answer)
        ended_s = time.perf_counter()
        return {
            "latency_ms": 1000 * (ended_s - started_s),
            "prompt_ms": 1000 * (read_s - started_s),
            "generate_ms": 1000 * (generated_s - first_s),
            "prompt_tokens": len(ids) - kept,
            "tokens": len(answer),
            "text": text,
        }


def peak_rss_bytes() -> int:
    """The kernel's high-water mark of this process."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text("ascii"))
    return int(found[1]) * _KIB if found else 0


def main() -> int:
    """Command line (see the module's docstring); prints the run as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("job", type=Path)
    parser.add_argument("--spawned-at", type=float, required=True, help="time.monotonic when this process was started")
    arguments = parser.parse_args()
    onnxruntime.set_default_logger_severity(3)
    job = json.loads(arguments.job.read_text("utf-8"))
    peer = Peer(arguments.model, job)
    peer.answer(job["warm"][0])
    first_decision_s = time.monotonic() - arguments.spawned_at
    for prompt in job["warm"][1:]:
        peer.answer(prompt)
    processor_before_s = time.process_time()
    answers = [peer.answer(prompt) for prompt in job["measured"]]
    processor_s = time.process_time() - processor_before_s
    found = {
        "first_decision_s": first_decision_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "processor_s": processor_s,
        "answers": answers,
        "prompts_differ": peer.differing(job["warm"] + job["measured"] + job["backlog"]),
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
