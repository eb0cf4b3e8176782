"""What a bundle says of its tasks, made ready as far as that needs no graph: it is done while the graphs are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_agent.contract.task import GoldenExample, TaskSpec, load_golden, load_task
from edge_agent.errors import PermanentError
from edge_agent.runtime.bundle import VerifiedBundle
from edge_agent.runtime.calibration import Calibration, load_calibration
from edge_agent.runtime.encoder import TextEncoder
from edge_agent.runtime.grammar import AnswerPlan, compile_plan
from edge_agent.runtime.guided import GuidedGrammars
from edge_agent.runtime.head_rows import read_head_rows
from edge_agent.runtime.kv_cache import KV_DTYPES, KvSegment
from edge_agent.runtime.prefix_store import PrefixKey, PrefixStore


@dataclass(frozen=True)
class ReadTask:
    """A task as its files say it.

    Args:
        spec: the task.
        plan: its decisions.
        calibration: how far its confidences can be trusted.
        golden: its golden examples; none where the bundle lists no file of them.
        prefix: token ids that every cache of the task begins with.
        capacity_tokens: most positions of a text.
        key: of the prefix's state.
        state: of the prefix, where it was kept on the disk, (2 * layers, kv_heads, tokens, head_dim).
    """

    spec: TaskSpec
    plan: AnswerPlan
    calibration: Calibration
    golden: tuple[GoldenExample, ...]
    prefix: tuple[int, ...]
    capacity_tokens: int
    key: PrefixKey
    state: KvSegment | None


def read_tasks(
    bundle: VerifiedBundle, encoder: TextEncoder, threads: int, prefixes: PrefixStore
) -> tuple[ReadTask, ...]:
    """Read every task of a bundle.

    Args:
        bundle: verified; nothing else is ever read.
        encoder: its tokenizer.
        threads: intra-op threads, which the prefixes' states depend on.
        prefixes: where the states are kept.

    Raises:
        PermanentError: ``task.*``, ``bundle.unsupported``, ``calibration.*``.
    """
    reader = _Reader(bundle, encoder, threads, prefixes)
    return tuple(reader.read(name) for name in bundle.manifest.tasks)


class _Reader:
    def __init__(self, bundle: VerifiedBundle, encoder: TextEncoder, threads: int, prefixes: PrefixStore) -> None:
        self._bundle = bundle
        self._model = bundle.manifest.model
        self._encoder = encoder
        self._threads = threads
        self._prefixes = prefixes
        head_ids = bundle.path / self._model.head_ids if self._model.head_ids else None
        self._head = read_head_rows(self._model.vocab_size, head_ids)
        self._guided: GuidedGrammars | None = None
        self._listed = {entry.path for entry in bundle.manifest.files}

    def read(self, name: str) -> ReadTask:
        folder = self._bundle.path / "tasks" / name
        spec = load_task(folder / "task.yaml")
        if spec.name != name:
            raise PermanentError("task.invalid", f"task {name!r} calls itself {spec.name!r}")
        plan = compile_plan(spec, self._encoder, self._guided_grammars, self._head)
        prefix = self._prefix(spec)
        capacity = len(prefix) + spec.limits.max_prompt_tokens + plan.max_tokens
        limit = self._model.max_context_tokens
        if capacity > limit:
            raise PermanentError(
                "task.context_exceeded",
                f"task {name!r} may need {capacity} tokens (prefix {len(prefix)}, event "
                f"{spec.limits.max_prompt_tokens}, answer {plan.max_tokens}); the model has {limit}",
            )
        golden_file, calibration_file = folder / "golden.jsonl", folder / "calibration.json"
        # Only listed files were verified, so only they are read.
        golden = load_golden(golden_file, spec) if self._is_listed(golden_file) else ()
        calibration = load_calibration(calibration_file if self._is_listed(calibration_file) else None, spec)
        key = PrefixKey(self._bundle.digest, name, prefix, self._threads)
        shape = (2 * self._model.num_layers, self._model.num_kv_heads, len(prefix), self._model.head_dim)
        state = self._prefixes.load(key, shape, KV_DTYPES[self._model.kv_dtype])
        return ReadTask(spec, plan, calibration, golden, prefix, capacity, key, state)

    def _prefix(self, spec: TaskSpec) -> tuple[int, ...]:
        bos = self._model.bos_token_id
        return (*(() if bos is None else (bos,)), *self._encoder.encode(spec.prompt.prefix))

    def _guided_grammars(self) -> GuidedGrammars:
        if self._guided is None:
            model = self._model
            self._guided = GuidedGrammars(self._encoder, model.vocab_size, model.eos_token_id, self._head)
        return self._guided

    def _is_listed(self, path: Path) -> bool:
        return str(path.relative_to(self._bundle.path)) in self._listed
