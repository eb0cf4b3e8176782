"""A text longer than a pass: it takes several, whose scores are those of the text in smaller pieces."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.contract.manifest import read_manifest
from edge_agent.errors import PermanentError
from edge_agent.runtime.kv_cache import MAX_PASS_TOKENS, KvCache, RowPass
from edge_agent.runtime.session import ModelSession
from export.checkpoint.synth import synthesise
from export.request import GraphOptions
from tests.export.conftest import TASK, TINY, Build

CAPACITY = 3 * MAX_PASS_TOKENS
LONG = 2 * MAX_PASS_TOKENS + 77
PIECE = 100


@pytest.fixture(scope="module")
def session(make_bundle: Build, tmp_path_factory: pytest.TempPathFactory) -> ModelSession:
    folder = tmp_path_factory.mktemp("long")
    synthesise("smollm2-135m", folder / "checkpoint", layers=2, **{**TINY, "max_position_embeddings": CAPACITY})
    (folder / "task").mkdir()
    (folder / "task" / "task.yaml").write_text(TASK)
    out = folder / "bundle"
    make_bundle(
        out,
        checkpoint=folder / "checkpoint",
        precision="fp32",
        tasks=(folder / "task",),
        graph=GraphOptions(together=True),
        max_context_tokens=CAPACITY,
    )
    return ModelSession(out, read_manifest(out)[0], 1)


@pytest.fixture(scope="module")
def text() -> list[int]:
    tokens: list[int] = np.random.default_rng(3).integers(3, TINY["vocab_size"], LONG).tolist()
    return tokens


@pytest.fixture(scope="module")
def in_pieces(session: ModelSession, text: list[int]) -> list[float]:
    cache = session.new_cache(CAPACITY)
    pieces = [text[start : start + PIECE] for start in range(0, LONG, PIECE)]
    found: list[float] = [cache.forward(piece) for piece in pieces][-1].tolist()
    return found


def test_long_text_takes_as_many_passes_as_it_needs(
    session: ModelSession, text: list[int], in_pieces: list[float]
) -> None:
    cache = session.new_cache(CAPACITY)
    found = cache.forward(text)
    assert (cache.passes, cache.length) == (3, LONG)
    np.testing.assert_allclose(found, in_pieces, rtol=1e-3, atol=1e-3)


def test_long_row_ends_with_its_scores_beside_a_short_one(
    session: ModelSession, text: list[int], in_pieces: list[float]
) -> None:
    cache = session.new_cache(CAPACITY, rows=2)
    short = session.new_cache(CAPACITY)
    expected = short.forward(text[:9]).copy()
    found = cache.run([RowPass(0, 0, text, [LONG - 1]), RowPass(1, 0, text[:9], [8])])
    assert cache.passes == 3
    np.testing.assert_allclose(found[0][0], in_pieces, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found[1][0], expected, rtol=1e-3, atol=1e-3)


def test_a_long_text_is_not_scored_at_its_beginning(session: ModelSession, text: list[int]) -> None:
    cache = session.new_cache(CAPACITY)
    with pytest.raises(PermanentError) as caught:
        cache.run([RowPass(0, 0, text, [5, LONG - 1])])
    assert caught.value.code == "worker.context"
    assert cache.passes == 0


def test_text_that_does_not_fit_is_refused_before_anything_runs(session: ModelSession) -> None:
    cache = session.new_cache(MAX_PASS_TOKENS + 10)
    assert isinstance(cache, KvCache)
    with pytest.raises(PermanentError) as caught:
        cache.forward([5] * (MAX_PASS_TOKENS + 11))
    assert caught.value.code == "worker.context"
    assert (cache.passes, cache.length) == (0, 0)
