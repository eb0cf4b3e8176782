"""Several ways on in one pass: each is scored as if it were alone, and the one that came true goes on from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edge_agent.contract.manifest import read_manifest
from edge_agent.runtime.kv_cache import KvCache, RowPass
from edge_agent.runtime.session import ModelSession
from export.checkpoint.synth import synthesise
from export.request import GraphOptions
from tests.export.conftest import TASK, TINY, Build
from tests.export.test_parity import TESTED, make_checkpoint

CAPACITY = 200
TRUNK = [7, 9, 11, 13, 15]
YES, NO, BEYOND = [21, 22, 23], [31, 32], [41, 42, 43, 44]
GUESS = [*YES, *NO, *BEYOND]
FOLLOWS = [-1, 0, 1, -1, 3, 2, 5, 6, 7]  # NO follows the trunk, BEYOND follows YES
NEAR = {"fp32": 1e-3, "int8": 0.05}


def built(make_bundle: Build, folder: Path, **options: Any) -> Path:
    synthesise("smollm2-135m", folder / "checkpoint", layers=2, **TINY)
    (folder / "task").mkdir()
    (folder / "task" / "task.yaml").write_text(TASK)
    out = folder / "bundle"
    make_bundle(out, checkpoint=folder / "checkpoint", tasks=(folder / "task",), **options)
    return out


@pytest.fixture(scope="module", params=["fp32", "int8"])
def session(request: pytest.FixtureRequest, make_bundle: Build, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = built(make_bundle, tmp_path_factory.mktemp("bundle"), precision=request.param)
    assert read_manifest(out)[0].model.alternatives
    return ModelSession(out, read_manifest(out)[0], 1), NEAR[request.param]


def test_int8_caches_go_without(make_bundle: Build, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle", graph=GraphOptions(kv="int8"))
    assert read_manifest(tmp_path / "bundle")[0].model.alternatives is None


def plainly(session: ModelSession, text: list[int]) -> Any:
    cache = session.new_cache(CAPACITY)
    return cache.forward(text).copy()


def assert_near(found: Any, expected: Any, near: float) -> None:
    assert np.abs(found - expected).max() <= near * np.abs(expected).max()


def test_each_way_is_scored_as_if_it_were_alone(session: Any) -> None:
    model, near = session
    cache = model.new_cache(CAPACITY)
    cache.forward([3, 4, 5, 6])
    ends = [len(TRUNK) - 1, len(TRUNK) + 2, len(TRUNK) + 4, len(TRUNK) + 8]
    (found,) = cache.run([RowPass(0, 4, [*TRUNK, *GUESS], ends, FOLLOWS)])
    ways = [[], YES, NO, [*YES, *BEYOND]]
    for scores, way in zip(found, ways, strict=True):
        assert_near(scores, plainly(model, [3, 4, 5, 6, *TRUNK, *way]), near)
    assert np.abs(found[1] - found[2]).max() > 0.1 * np.abs(found[1]).max(), "the ways differ"


def test_rows_of_different_lengths_go_on_together(session: Any) -> None:
    model, near = session
    cache = model.new_cache(CAPACITY, rows=2)
    texts = [[*range(60, 79)], [*range(90, 97)]]
    for row, text in enumerate(texts):
        cache.run([RowPass(row, 0, text, [len(text) - 1])])
    found = cache.run([RowPass(row, len(text), [51, 52 + row], [1]) for row, text in enumerate(texts)])
    for row, (text, scores) in enumerate(zip(texts, found, strict=True)):
        assert_near(scores[0], plainly(model, [*text, 51, 52 + row]), near)


@pytest.mark.parametrize("way", [YES, NO, [*YES, *BEYOND], []], ids=["first", "second", "beyond", "none"])
def test_text_goes_on_as_if_nothing_had_been_tried(session: Any, way: list[int]) -> None:
    model, _ = session
    cache = model.new_cache(CAPACITY)
    cache.run([RowPass(0, 0, [*TRUNK, *GUESS], [len(TRUNK) - 1], FOLLOWS)])
    rest = [*way, 51, 52]
    (found,) = cache.run([RowPass(0, len(TRUNK), rest, [len(rest) - 1])])
    assert np.array_equal(found[0], plainly(model, [*TRUNK, *rest]))


def test_the_first_way_is_in_line_and_gives_the_same_bits_as_without_the_others(session: Any) -> None:
    model, _ = session
    cache = model.new_cache(CAPACITY)
    end = len(TRUNK) + len(YES) - 1
    (found,) = cache.run([RowPass(0, 0, [*TRUNK, *GUESS], [len(TRUNK) - 1, end], FOLLOWS)])
    assert np.array_equal(found[0], plainly(model, TRUNK))
    assert np.array_equal(found[1], plainly(model, [*TRUNK, *YES]))
    start = len(TRUNK) + len(YES)
    (found,) = cache.run([RowPass(0, start, [51, 52], [1])])
    assert np.array_equal(found[0], plainly(model, [*TRUNK, *YES, 51, 52]))


def test_a_pass_after_alternatives_hides_nothing_any_more(session: Any) -> None:
    model, near = session
    cache = model.new_cache(CAPACITY, rows=2)
    cache.run([RowPass(0, 0, [*TRUNK, *GUESS], [len(TRUNK) - 1], FOLLOWS)])
    long = [*range(60, 60 + len(TRUNK) + len(GUESS))]
    found = cache.run([RowPass(0, 0, long, [len(long) - 1]), RowPass(1, 0, long[:3], [2])])
    assert_near(found[0][0], plainly(model, long), near)
    assert_near(found[1][0], plainly(model, long[:3]), near)


@pytest.mark.parametrize(("like", "changes"), TESTED, ids=[f"{like}-{n}" for n, (like, _) in enumerate(TESTED)])
def test_every_architecture_takes_them_but_for_sliding_windows(
    like: str, changes: dict[str, Any], make_bundle: Build, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "checkpoint", like, changes)
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "task.yaml").write_text(TASK)
    out = tmp_path / "bundle"
    tasks = (tmp_path / "task",)
    make_bundle(out, checkpoint=tmp_path / "checkpoint", tasks=tasks, precision="fp32", allow_large=True)
    onnx.checker.check_model(str(out / "model/decoder.onnx"))
    manifest = read_manifest(out)[0]
    assert bool(manifest.model.alternatives) == (not changes.get("sliding_window"))
    cache = ModelSession(out, manifest, 1).new_cache(CAPACITY)
    assert isinstance(cache, KvCache)
    if not cache.takes_alternatives:
        return
    (found,) = cache.run([RowPass(0, 0, [*TRUNK, *GUESS], [len(TRUNK) + 4], FOLLOWS)])
    assert_near(found[0], plainly(ModelSession(out, manifest, 1), [*TRUNK, *NO]), 1e-3)
