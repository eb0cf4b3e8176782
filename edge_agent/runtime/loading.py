"""From verified files to a model that answers: its graphs and its tokenizer, read at the same time."""

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
    from edge_agent.runtime.static_session import StaticSession


@dataclass(frozen=True)
class LoadedModel:
    """What is read of a bundle before its tasks are.

    Args:
        session: the graphs.
        encoder: the tokenizer.
    """

    session: ModelSession | StaticSession
    encoder: TextEncoder


def load_model(bundle: VerifiedBundle, threads: int, meanwhile: Callable[[], object] = lambda: None) -> LoadedModel:
    """Load graphs and tokenizer.

    The library loads graphs without holding up the interpreter; the tokenizer's library holds it up all the while. So
    the graphs begin first, and a thread does the rest beside them.

    Args:
        bundle: verified; nothing else is ever loaded.
        threads: intra-op threads, at least 1.
        meanwhile: is called in that thread, before the tokenizer is read: for imports.

    Raises:
        IntegrityError: ``bundle.file_missing`` or ``bundle.file_corrupt``.
        PermanentError: ``bundle.unsupported``, ``worker.out_of_memory``.
    """
    with ThreadPoolExecutor(1, "tokenizer") as beside:
        beside.submit(meanwhile)
        encoder = beside.submit(_read_tokenizer, bundle)
        session = _open_session(bundle, threads)
        return LoadedModel(session, encoder.result())


def _read_tokenizer(bundle: VerifiedBundle) -> TextEncoder:
    from edge_agent.runtime.encoder import TextEncoder

    model = bundle.manifest.model
    table = None if model.token_table is None else bundle.path / model.token_table
    encoder = TextEncoder(bundle.path / model.tokenizer, model.vocab_size, table)
    if table is None:
        return_freed_memory()  # 150,000 tokens leave 50 MB behind
    return encoder


def _open_session(bundle: VerifiedBundle, threads: int) -> ModelSession | StaticSession:
    manifest = bundle.manifest
    if manifest.model.graph_interface == 2:
        from edge_agent.runtime.static_session import StaticSession

        check_runtime(manifest)
        return StaticSession(bundle.path, manifest.model, manifest.target, threads)
    return ModelSession(bundle.path, manifest, threads)
