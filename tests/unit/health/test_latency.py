from __future__ import annotations

import math
import statistics

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.health.latency import LatencyWindow, Percentiles


def test_an_empty_window_knows_no_latency() -> None:
    assert LatencyWindow().percentiles() == Percentiles(0, None, None, None)


def test_percentiles_are_latencies_that_occurred() -> None:
    window = LatencyWindow()
    for latency_ms in range(1, 101):
        window.add(float(latency_ms))
    assert window.percentiles() == Percentiles(100, 50.0, 95.0, 100.0)


def test_old_latencies_leave_the_window() -> None:
    window = LatencyWindow(size=10)
    for latency_ms in [1000.0] * 50 + [1.0] * 10:
        window.add(latency_ms)
    assert window.percentiles() == Percentiles(10, 1.0, 1.0, 1.0)


def test_a_new_model_starts_with_an_empty_window() -> None:
    window = LatencyWindow()
    window.add(5.0)
    window.clear()
    assert window.percentiles().count == 0


def test_a_latency_that_no_clock_can_have_measured_is_left_out() -> None:
    window = LatencyWindow()
    for latency_ms in (math.nan, math.inf, -1.0):
        window.add(latency_ms)
    assert window.percentiles().count == 0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_p50_and_p95_bound_their_share_of_the_samples(samples: list[float]) -> None:
    window = LatencyWindow()
    for sample in samples:
        window.add(sample)
    found = window.percentiles()
    assert found.p50_ms is not None
    assert found.p95_ms is not None
    assert sum(s <= found.p50_ms for s in samples) >= 0.5 * len(samples)
    assert sum(s <= found.p95_ms for s in samples) >= 0.95 * len(samples)
    assert min(samples) <= found.p50_ms <= found.p95_ms <= max(samples)
    assert abs(found.p50_ms - statistics.median_low(samples)) < 1e-9
