"""The correctness oracle: greedy constrained decoding in its plainest form, one token and one pass at a time.

No key-value cache tricks, no forced-token batches, no trees, no shared buffers: what the device's engine does fast
must agree with what this does slowly. It shares with the engine only the definition of a prompt and, for open fields
(strings, wide integers), the field's grammar.

The answer is compact JSON in schema order. Its pieces (text up to a value, the value, text up to the next) are
tokenised apart; a closed field is a choice among the token sequences of its values. Where a pruned head has no score
for a token at which values part, those values go on byte by byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edge_agent.contract.event import Event
from edge_agent.contract.manifest import ModelSpec
from edge_agent.contract.output import BoolField, EnumField, IntField, OutputField, TextField
from edge_agent.contract.task import TaskSpec
from edge_agent.errors import PermanentError
from edge_agent.runtime.adapter import Arrays, adapter_feeds
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.guided import GuidedGrammars
from edge_agent.runtime.head_rows import read_head_rows
from edge_agent.runtime.prompt import event_prompt

Floats = npt.NDArray[np.float32]
MAX_LISTED_INTEGERS = 1024
"""Integer ranges up to this size are a choice among spelled values, wider ones follow a grammar (as on the device)."""


@dataclass(frozen=True)
class Choice:
    """One point where the grammar left more than one token.

    Args:
        field: the answer's field that was being written.
        logits: of the allowed tokens only, float32 [allowed].
        chosen: position of the taken token in ``logits``.
    """

    field: str
    logits: Floats
    chosen: int

    def probability(self, temperature: float = 1.0) -> float:
        """Softmax over the allowed tokens, p_i ∝ p_i^(1/T), of the taken one."""
        scaled = self.logits.astype(np.float64) / temperature
        exponentials = np.exp(scaled - scaled.max())
        return float(exponentials[self.chosen] / exponentials.sum())


@dataclass(frozen=True)
class Decoded:
    """A greedy answer with everything that was chosen on the way.

    Args:
        decision: the model's own answer, before guards.
        choices: every free choice, in order.
        tokens: ids of the answer, forced ones included.
    """

    decision: dict[str, Any]
    choices: tuple[Choice, ...]
    tokens: tuple[int, ...]

    def confidence(self, temperatures: Mapping[str, float] | None = None) -> dict[str, float]:
        """Probability of each field's value: product over the field's choices; 1.0 where nothing was left to choose."""
        result = dict.fromkeys(self.decision, 1.0)
        for choice in self.choices:
            result[choice.field] *= choice.probability((temperatures or {}).get(choice.field, 1.0))
        return result


class StepModel:
    """A graph run with ordinary growing caches.

    Args:
        graph: path of the ONNX file; the head's files lie beside it where the graph has them apart.
        spec: its shape.
        threads: intra-op threads.
        adapter: a task's matrices, of `edge_agent.runtime.adapter.task_adapter`; None: the shared weights as they are.

    Attributes:
        head_rows: the tokens that the logits score.
    """

    def __init__(self, graph: Path, spec: ModelSpec, threads: int = 1, adapter: Arrays | None = None) -> None:
        self._session = _session(graph, threads)
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        self._adapter = adapter_feeds(spec.adapter_inputs or (), shapes, adapter or {})
        self._head = _session(graph.with_name(Path(spec.head).name), threads) if spec.head else None
        beside = graph.with_name(Path(spec.head_ids).name) if spec.head_ids else None
        self.head_rows = read_head_rows(spec.vocab_size, beside)
        self._spec = spec
        self._outputs = [output.name for output in self._session.get_outputs()]
        dtype = np.dtype(spec.kv_dtype)
        self._empty = np.zeros((1, spec.num_kv_heads, 0, spec.head_dim), dtype)

    def start(self) -> dict[str, Floats]:
        """Empty caches: name of the past input to float32 or int8 [1, kv_heads, 0, head_dim]."""
        names = [f"past_key_values.{n}.{part}" for n in range(self._spec.num_layers) for part in ("key", "value")]
        return dict.fromkeys(names, self._empty)

    def step(self, ids: list[int], past: dict[str, Floats]) -> tuple[Floats, dict[str, Floats]]:
        """Run ``ids`` after ``past``.

        Returns:
            Logits of the last position, float32 [vocab] (-inf for what a pruned head does not score), and the longer
            caches.
        """
        before = next(iter(past.values())).shape[2]
        # A single row is multiplied by another kernel, which rounds otherwise than those for two and more: so a token
        # that comes alone is run beside a copy of itself, of which nothing is kept.
        kept = len(ids)
        if kept == 1 and self._spec.score_at:
            ids = ids * 2
        length = before + len(ids)
        feeds: dict[str, Any] = {
            "input_ids": np.array([ids], np.int64),  # [1, seq]
            "attention_mask": np.ones((1, length), np.int64),  # [1, past + seq]
            **past,
            **self._adapter,
        }
        if self._spec.ragged:
            feeds["query_seqlens"] = np.array([len(ids)], np.int32)  # [1]
        if self._spec.score_at:
            feeds["score_at"] = np.array([[0, kept - 1]], np.int64)  # [1, 2]: the last position, as ever
        if self._spec.alternatives:  # none: every token follows the one before it, and sees all before it
            feeds["position_ids"] = np.arange(length - len(ids), length)[None]  # [1, seq]
            feeds["attention_bias"] = np.zeros((1, 1, len(ids), length), np.float32)
        outputs = dict(zip(self._outputs, self._session.run(None, feeds), strict=True))
        present = {name: outputs[name.replace("past_key_values", "present")][:, :, : before + kept] for name in past}
        if self._head is None:
            scores = outputs["logits"]
        else:
            (scores,) = self._head.run(["logits"], {"hidden": outputs["hidden"]})
        if self.head_rows.whole:
            return scores[0, -1], present
        logits = np.full(self._spec.vocab_size, -np.inf, np.float32)
        logits[self.head_rows.ids] = scores[0, -1]
        return logits, present


def _session(graph: Path, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        raise PermanentError("export.graph_unloadable", f"{graph.name}: {error}") from error


class GreedyDecoder:
    """Answers events with a graph, a tokenizer and a task.

    Args:
        graph: path of the ONNX file.
        tokenizer: path of ``tokenizer.json``.
        spec: the graph's shape and special tokens.
        threads: intra-op threads.
        adapter: of the task that will be asked; see `StepModel`.
    """

    def __init__(
        self, graph: Path, tokenizer: Path, spec: ModelSpec, threads: int = 1, adapter: Arrays | None = None
    ) -> None:
        self._model = StepModel(graph, spec, threads, adapter)
        self._spec = spec
        self._encoder = TextEncoder(tokenizer, spec.vocab_size)

    def prompt(self, task: TaskSpec, event: Event) -> list[int]:
        """Token ids of prefix and event."""
        start = [] if self._spec.bos_token_id is None else [self._spec.bos_token_id]
        prefix = self._encoder.encode(task.prompt.prefix)
        return [*start, *prefix, *event_prompt(task, event, self._encoder.encode).ids]

    def answer_ids(self, decision: dict[str, Any]) -> list[int]:
        """Token ids of a decision written as compact JSON."""
        return self._encoder.encode(json.dumps(decision, separators=(",", ":"), ensure_ascii=False))

    def decide(self, task: TaskSpec, event: Event) -> Decoded:
        """Answer one event.

        Raises:
            RefusedError: ``event.*``.
        """
        run = _Run(self._model, self.prompt(task, event))
        fields = task.output_fields
        for token in self._encoder.encode("{" + _key(fields[0])):
            run.take(token)
        decision: dict[str, Any] = {}
        for field, following in zip(fields, [*fields[1:], None], strict=True):
            after = _quote(field) + ("}" if following is None else "," + _key(following))
            decision[field.name] = self._decide_field(run, field, after)
        return Decoded(decision, tuple(run.choices), tuple(run.tokens))

    def _decide_field(self, run: _Run, field: OutputField, after: str) -> Any:
        values = _values(field)
        if not values:
            return self._decide_open(run, field, after)
        # The text after the value ends every sequence, so "stop" and "stop_all" part at the quote after "stop".
        ending = self._encoder.encode(after)
        left = {value: [*self._encoder.encode(text), *ending] for value, text in values.items()}
        depth = 0
        while len(left) > 1:
            options = sorted({sequence[depth] for sequence in left.values()})
            if len(options) > 1 and any(token not in self._model.head_rows for token in options):
                left = {value: self._by_bytes(sequence, depth) for value, sequence in left.items()}
                options = sorted({sequence[depth] for sequence in left.values()})
            taken = run.choose(field.name, options) if len(options) > 1 else run.take(options[0])
            left = {value: sequence for value, sequence in left.items() if sequence[depth] == taken}
            depth += 1
        (value, sequence), *_ = left.items()
        for token in sequence[depth:]:
            run.take(token)
        return value

    def _by_bytes(self, sequence: list[int], place: int) -> list[int]:
        """The same text with one token written byte by byte."""
        return [*sequence[:place], *self._encoder.spelling.by_bytes(sequence[place]), *sequence[place + 1 :]]

    def _decide_open(self, run: _Run, field: OutputField, after: str) -> Any:
        spec = self._spec
        grammars = GuidedGrammars(self._encoder, spec.vocab_size, spec.eos_token_id, self._model.head_rows)
        if isinstance(field, TextField):
            planned = grammars.text(field, after)
        elif isinstance(field, IntField):
            planned = grammars.integer(field, after)
        else:
            raise TypeError(field.kind)
        guided = planned.start()
        while not guided.finished():
            forced = guided.forced()
            for token in forced:
                run.take(token)
            if not forced:
                options = guided.allowed().tolist()
                taken = run.choose(field.name, options) if len(options) > 1 else run.take(options[0])
                guided.choose(taken)
        return guided.value()


class _Run:
    """One answer in the making."""

    def __init__(self, model: StepModel, prompt: list[int]) -> None:
        self._model = model
        self._logits, self._past = model.step(prompt, model.start())
        self.tokens: list[int] = []
        self.choices: list[Choice] = []

    def choose(self, field: str, options: list[int]) -> int:
        """Take the likeliest of several tokens (the lowest id among equals) and note the choice."""
        logits = self._logits[options]
        best = int(logits.argmax())
        self.choices.append(Choice(field, logits.copy(), best))
        return self.take(options[best])

    def take(self, token: int) -> int:
        """Append one token."""
        self.tokens.append(token)
        self._logits, self._past = self._model.step([token], self._past)
        return token


def _values(field: OutputField) -> dict[Any, str]:
    """Every value of a closed field with its JSON spelling inside the quotes; empty for an open field."""
    match field:
        case EnumField():
            return {value: json.dumps(value, ensure_ascii=False)[1:-1] for value in field.values}
        case BoolField():
            return {False: "false", True: "true"}
        case IntField() if field.maximum - field.minimum < MAX_LISTED_INTEGERS:
            return {value: str(value) for value in range(field.minimum, field.maximum + 1)}
        case _:
            return {}


def _quote(field: OutputField) -> str:
    return '"' if isinstance(field, EnumField | TextField) else ""


def _key(field: OutputField) -> str:
    return f"{json.dumps(field.name)}:{_quote(field)}"
