"""From verified files to a model that answers: its graphs, its tokenizer and its tasks, read at the same time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_agent.runtime.bundle import VerifiedBundle
from edge_agent.runtime.memory import return_freed_memory
from edge_agent.runtime.session import ModelSession, check_runtime

if TYPE_CHECKING:  # imported while the graphs are loaded
    from edge_agent.runtime.encoder import TextEncoder
    from edge_agent.runtime.prefix_store import PrefixStore
    from edge_agent.runtime.static_session import StaticSession
    from edge_agent.runtime.task_files import ReadTask


@dataclass(frozen=True)
class LoadedModel:
    """What is read of a bundle before it can answer.

    Args:
        session: the graphs.
        encoder: the tokenizer.
        tasks: all of the bundle's.
    """

    session: ModelSession | StaticSession
    encoder: TextEncoder
    tasks: tuple[ReadTask, ...]


def load_model(
    bundle: VerifiedBundle, threads: int, prefixes: PrefixStore, meanwhile: Callable[[], object] = lambda: None
) -> LoadedModel:
    """Load graphs, tokenizer and tasks.

    The library loads graphs without holding up the interpreter; whatever else is to be done holds it up all the while.
    So the graphs begin first, and a thread does the rest beside them.

    Args:
        bundle: verified; nothing else is ever loaded.
        threads: intra-op threads, at least 1.
        prefixes: where the states of the tasks' prefixes are kept.
        meanwhile: is called in that thread, before anything else: for imports.

    Raises:
        IntegrityError: ``bundle.file_missing`` or ``bundle.file_corrupt``.
        PermanentError: ``bundle.unsupported``, ``task.*``, ``worker.out_of_memory``.
    """
    with ThreadPoolExecutor(1, "tasks") as beside:
        beside.submit(meanwhile)
        rest = beside.submit(_read_rest, bundle, threads, prefixes)
        session = _open_session(bundle, threads)
        return LoadedModel(session, *rest.result())


def _read_rest(bundle: VerifiedBundle, threads: int, prefixes: PrefixStore) -> tuple[TextEncoder, tuple[ReadTask, ...]]:
    from edge_agent.runtime.encoder import TextEncoder
    from edge_agent.runtime.task_files import read_tasks

    model = bundle.manifest.model
    table = None if model.token_table is None else bundle.path / model.token_table
    encoder = TextEncoder(bundle.path / model.tokenizer, model.vocab_size, table)
    if table is None:
        return_freed_memory()  # 150,000 tokens leave 50 MB behind
    return encoder, read_tasks(bundle, encoder, threads, prefixes)


def _open_session(bundle: VerifiedBundle, threads: int) -> ModelSession | StaticSession:
    manifest = bundle.manifest
    if manifest.model.graph_interface == 2:
        from edge_agent.runtime.static_session import StaticSession

        check_runtime(manifest)
        return StaticSession(bundle.path, manifest.model, manifest.target, threads)
    return ModelSession(bundle.path, manifest, threads)
