"""Repeated events are answered from memory, within bounds."""

from __future__ import annotations

from edge_agent.runtime.decision_cache import DecisionCache
from edge_agent.runtime.decoder import Decoded


def decoded(value: str) -> Decoded:
    return Decoded({"category": value}, {"category": 0.5}, [1, 2, 3], (1,), passes=1)


def test_only_the_very_same_text_is_found() -> None:
    cache = DecisionCache(1 << 20)
    cache.put("text: pump 4", decoded("hydraulic"))
    assert cache.get("text: pump 4") == decoded("hydraulic")
    assert cache.get("text: pump 4 ") is None
    assert cache.hits == 1


def test_least_recently_used_answer_is_forgotten_first() -> None:
    cache = DecisionCache(7000)
    for name in ("a", "b", "c", "d"):
        cache.put(name, decoded(name))
    before = len(cache)
    assert cache.get("a") is not None
    cache.put("e", decoded("e"))
    assert cache.get("a") is not None
    assert cache.get("b") is None
    assert len(cache) == before


def test_memory_is_bounded_by_bytes_however_long_the_texts() -> None:
    cache = DecisionCache(100_000)
    for n in range(200):
        cache.put(f"{n}" + "x" * 5000, decoded("a"))
    assert 0 < len(cache) <= 5
    cache.put("y" * 1_000_000, decoded("a"))
    assert cache.get("y" * 1_000_000) is None, "what is larger than all of it is not kept"


def test_no_memory_means_no_answers_from_it() -> None:
    cache = DecisionCache(0)
    cache.put("a", decoded("a"))
    assert cache.get("a") is None
