"""A promise about errors that an engineer can act on: kept as often as it says, and never made without evidence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.document import read_document, to_document
from edge_agent.contract.thresholds import ChosenFloor, ErrorTarget
from edge_agent.errors import PermanentError
from edge_agent.runtime.calibration import Knots, load_calibration
from export.proof.binomial import at_most, interval, least_count, lower_bound, upper_bound
from export.proof.calibrate import calibration_bytes
from export.proof.floors import choose_floor, halves, never, scout
from export.proof.isotonic import MIN_EVENTS, fit_knots, helpful_knots, log_loss
from export.proof.passing import Passing
from export.proof.reliability import Pair
from tests.unit.runtime.test_calibration import ASKING

TARGET = ErrorTarget(max_wrong=0.1, certainty=0.9)
DRAWS = 300
EVENTS = 250


def choose(scouted: list[Pair], tested: list[Pair], target: ErrorTarget = TARGET) -> ChosenFloor:
    return choose_floor(scouted, tested, target, (len(scouted), len(tested)))


# --- exact counts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "share"), [(1, 0.3), (7, 0.01), (40, 0.1), (300, 0.02), (300, 0.9)])
def test_probabilities_of_counts_are_those_of_exact_fractions(count: int, share: float) -> None:
    exact = Fraction(share)
    total = Fraction(0)
    for wrong in range(count + 1):
        total += math.comb(count, wrong) * exact**wrong * (1 - exact) ** (count - wrong)
        assert at_most(wrong, count, share) == pytest.approx(float(total), rel=1e-9)


def test_published_interval_of_ten_wrong_in_a_hundred() -> None:
    assert interval(10, 100) == pytest.approx((0.0490, 0.1762), abs=5e-5)


def test_three_hundred_right_answers_rule_out_one_per_cent_and_299_are_the_fewest() -> None:
    assert upper_bound(0, 300, 0.95) == pytest.approx(1 - 0.05 ** (1 / 300))
    assert least_count(0.01, 0.95) == 299
    assert at_most(0, 299, 0.01) <= 0.05 < at_most(0, 298, 0.01)


@pytest.mark.parametrize(("wrong", "count", "ends"), [(0, 0, (0.0, 1.0)), (0, 5, (0.0, 0.522)), (5, 5, (0.478, 1.0))])
def test_an_interval_of_nothing_and_of_all_keeps_its_ends(wrong: int, count: int, ends: tuple[float, float]) -> None:
    assert interval(wrong, count) == pytest.approx(ends, abs=1e-3)


@given(st.integers(0, 60), st.integers(1, 60), st.floats(0.5, 0.99))
def test_bounds_lie_on_their_side_of_the_count_and_are_where_the_probability_says(
    wrong: int, count: int, certainty: float
) -> None:
    wrong = min(wrong, count)
    upper, lower = upper_bound(wrong, count, certainty), lower_bound(wrong, count, certainty)
    assert 0 <= lower <= upper <= 1
    if wrong < count:
        assert at_most(wrong, count, upper) == pytest.approx(1 - certainty, abs=1e-9)


# --- the promise ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Answers whose error is known at every confidence, so that a floor's true risk is too.

    Args:
        wrong: probability of a wrong value at a confidence.
        risk: share of wrong values from a floor on, by integration.
    """

    wrong: Callable[[float], float]
    risk: Callable[[float], float]

    def draw(self, rng: np.random.Generator, count: int = EVENTS) -> list[Pair]:
        return [(float(c), bool(rng.random() >= self.wrong(float(c)))) for c in rng.random(count)]


def dip(confidence: float) -> float:
    """Surest answers are worse than the next: overconfident, as a model on new wording is."""
    return 0.3 if confidence > 0.95 else 0.25 * (1 - confidence) + 0.05


WORLDS = {
    # Every floor breaks the target by a hair: whatever is chosen is wrong, so hardly anything may be.
    "flat": World(lambda _: 0.1001, lambda _: 0.1001),
    # The surer the better: risk from floor f on is 0.4 (1 - f) / 2, at the target for f = 0.5.
    "falling": World(lambda c: 0.4 * (1 - c), lambda f: 0.2 * (1 - f)),
    # At 0.115 down to a floor of 0.1, and right below: risk falls again towards the end of the sequence, to 0.1035.
    "good tail": World(lambda c: 0.115 * (c >= 0.1), lambda f: 0.115 * min(1.0, 0.9 / (1 - f))),
}  # fmt: skip


def breaks(world: World, search: Callable[[list[Pair], list[Pair]], float | None]) -> int:
    """Draws in which the floor that was found breaks the target in truth."""
    rng = np.random.default_rng(20260714)
    found = [search(world.draw(rng), world.draw(rng)) for _ in range(DRAWS)]
    return sum(floor is not None and world.risk(floor) > TARGET.max_wrong for floor in found)


def most_breaks() -> int:
    """So many breaks in `DRAWS` that more would come by chance once in a thousand runs, were the promise kept."""
    return next(count for count in range(DRAWS) if at_most(count, DRAWS, 1 - TARGET.certainty) > 0.999)


@pytest.mark.parametrize("name", WORLDS)
def test_chosen_floor_breaks_the_target_no_more_often_than_promised(name: str) -> None:
    assert breaks(WORLDS[name], lambda first, second: choose(first, second).floor) <= most_breaks()


def test_a_search_that_looks_at_every_floor_would_break_the_promise() -> None:
    """That the test above can fail: the same bound at each floor, and the smallest that passes is taken."""

    def greedy(_: list[Pair], second: list[Pair]) -> float | None:
        passing = []
        ranked = sorted(second, reverse=True)
        for taken in range(1, len(ranked) + 1):
            wrong = sum(not hit for _, hit in ranked[:taken])
            if at_most(wrong, taken, TARGET.max_wrong) <= 1 - TARGET.certainty:
                passing.append(ranked[taken - 1][0])
        return min(passing, default=None)

    assert breaks(WORLDS["flat"], greedy) > most_breaks()


def test_a_floor_is_found_where_there_is_one_and_it_is_not_needlessly_strict() -> None:
    rng = np.random.default_rng(5)
    world = WORLDS["falling"]
    found = [choose(world.draw(rng, 2000), world.draw(rng, 2000)).floor for _ in range(20)]
    # In truth it is 0.5; one draw in ten may fall below, and none far.
    assert all(floor is not None and 0.4 < floor < 0.75 for floor in found), found


def test_overconfident_surest_answers_do_not_end_the_search_before_it_begins() -> None:
    world = World(dip, lambda _: 0.0)
    rng = np.random.default_rng(6)
    found = choose(world.draw(rng, 3000), world.draw(rng, 3000), ErrorTarget(max_wrong=0.2))
    assert found.floor is not None
    assert found.passed > 1500


PAIRS = st.lists(st.tuples(st.integers(0, 20).map(lambda n: n / 20), st.booleans()), max_size=80)


@given(PAIRS, PAIRS, st.floats(0.5, 0.98), st.floats(0.001, 0.019))
def test_more_certainty_never_gives_a_lower_floor(
    scouted: list[Pair], tested: list[Pair], certainty: float, more: float
) -> None:
    low, high = (
        choose(scouted, tested, ErrorTarget(max_wrong=0.2, certainty=c)) for c in (certainty, certainty + more)
    )
    if high.floor is not None:
        assert low.floor is not None
        assert low.floor <= high.floor


@given(PAIRS, PAIRS, st.data())
def test_a_wrong_answer_made_right_never_raises_the_floor(
    scouted: list[Pair], tested: list[Pair], data: st.DataObject
) -> None:
    before = choose(scouted, tested)
    if before.floor is None or not tested:
        return
    better = list(tested)
    index = data.draw(st.integers(0, len(tested) - 1))
    better[index] = (tested[index][0], True)
    after = choose(scouted, better)
    assert after.floor is not None
    assert after.floor <= before.floor


@given(PAIRS, PAIRS)
def test_counts_are_those_of_the_floor_and_keep_the_target(scouted: list[Pair], tested: list[Pair]) -> None:
    found = choose(scouted, tested)
    if found.floor is None:
        assert (found.passed, found.wrong) == (0, 0)
        return
    hits = [hit for confidence, hit in tested if confidence >= found.floor]
    assert (found.passed, found.wrong) == (len(hits), hits.count(False))
    assert upper_bound(found.wrong, found.passed, TARGET.certainty) <= TARGET.max_wrong + 1e-9


# --- edges ------------------------------------------------------------------------------------------------------------


def test_all_right_and_enough_of_them_lets_everything_pass() -> None:
    rows = [(n / 100, True) for n in range(100)]
    assert choose(rows, rows).floor == 0.0


@pytest.mark.parametrize("confidence", [1.0, 0.25])
def test_answers_of_one_confidence_are_taken_or_left_together(confidence: float) -> None:
    right = [(confidence, True)] * 60
    assert choose(right, right).passed == 60
    assert choose(right, [*right[:30], *[(confidence, False)] * 30]).floor is None


def test_all_wrong_is_always_unsure_and_no_number_of_events_would_do() -> None:
    rows = [(n / 100, False) for n in range(100)]
    found = choose(rows, rows)
    assert (found.floor, found.needed_events) == (None, None)


def test_too_few_events_are_told_how_many_are_needed_at_least() -> None:
    rows = [(0.9, True)] * (least_count(0.1, 0.9) - 1)
    found = choose(rows, rows)
    assert (found.floor, found.needed_events) == (None, 2 * least_count(0.1, 0.9))


def test_no_events_at_all_are_always_unsure() -> None:
    assert choose([], []).floor is None
    assert choose([(0.9, True)] * 99, []).floor is None
    assert choose([], [(0.9, True)] * 99).floor == 0.0  # nothing was scouted, so the one floor tested is the lowest


def test_the_number_of_events_that_is_named_would_do_if_they_are_alike() -> None:
    rows = [(0.9, n % 20 > 0) for n in range(60)]  # one in twenty wrong, one in ten allowed
    found = choose(rows, rows)
    assert found.floor is None
    assert found.needed_events is not None
    enough = [(0.9, n % 20 > 0) for n in range(found.needed_events // 2)]
    assert choose(enough, enough).floor is not None


@pytest.mark.parametrize("confidence", [math.nan, math.inf, -0.1, 1.1])
@pytest.mark.parametrize("half", [0, 1])
def test_a_confidence_that_is_none_is_refused(confidence: float, half: int) -> None:
    rows = [[(0.9, True)] * 40, [(0.9, True)] * 40]
    rows[half][7] = (confidence, True)
    with pytest.raises(PermanentError) as caught:
        choose(rows[0], rows[1])
    assert caught.value.code == "worker.bad_logits"


@pytest.mark.parametrize("count", [0, 1, 2, 9, 100])
def test_every_event_is_in_one_half_and_always_in_the_same(count: int) -> None:
    rows = list(range(count))
    first, second = halves(rows)
    assert sorted([*first, *second]) == rows
    assert len(first) - len(second) in (0, 1)
    assert halves(rows) == (first, second)


def test_the_way_to_measure_sureness_is_the_one_that_lets_more_pass() -> None:
    rng = np.random.default_rng(1)
    useful, useless = WORLDS["falling"].draw(rng), WORLDS["flat"].draw(rng)
    assert scout(useful, TARGET) > scout(useless, TARGET)
    assert scout([], TARGET) < scout(useful, TARGET)


# --- a line through counts --------------------------------------------------------------------------------------------


def answers(right: Callable[[float], float], count: int, seed: int = 0) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [(float(c), bool(rng.random() < right(float(c)))) for c in rng.random(count)]


def test_a_line_straightens_what_no_temperature_can() -> None:
    def bent(confidence: float) -> float:
        return 0.5 if confidence < 0.9 else 0.6

    line = helpful_knots(answers(bent, 2000))
    assert line is not None
    fresh = answers(bent, 2000, seed=1)
    assert sum(log_loss(pair, line.read) for pair in fresh) < sum(log_loss(pair, float) for pair in fresh)
    assert abs(line.read(0.2) - 0.5) < 0.1


def test_no_line_is_taken_where_the_confidence_is_right_as_it_is() -> None:
    assert helpful_knots(answers(lambda confidence: confidence, 2000)) is None


def test_few_events_draw_no_line() -> None:
    assert helpful_knots(answers(lambda _: 0.5, MIN_EVENTS - 1)) is None


@pytest.mark.parametrize("rows", [[], [(0.5, True)], [(n / 9, True) for n in range(9)], [(0.5, True), (0.5, False)]])
def test_answers_that_say_nothing_about_shape_draw_no_line(rows: list[Pair]) -> None:
    assert fit_knots(rows) is None


@given(PAIRS)
def test_a_line_rises_and_depends_on_no_order(pairs: list[Pair]) -> None:
    line = fit_knots(pairs)
    assert line == fit_knots(pairs[::-1])
    if line is not None:
        assert list(line.right) == sorted(line.right)
        assert read_document(Knots, to_document(line)) == line


# --- the file and the figures -----------------------------------------------------------------------------------------


def test_what_the_exporter_writes_is_what_the_device_reads(tmp_path: Path) -> None:
    target = ErrorTarget(max_wrong=0.01)
    path = tmp_path / "calibration.json"
    floor = ChosenFloor(
        max_wrong=0.01, certainty=0.95, floor=0.875, events=900, passed=700, wrong=1, over=("severity", "stop")
    )
    line = Knots(raw=(0.1, 0.9), right=(0.2, 0.8))
    for knots, found in (({}, floor), ({"stop": line}, floor), ({}, never(target, 900, 1200))):
        path.write_bytes(calibration_bytes({"severity": 1.3}, knots, {"severity": found}))
        read = load_calibration(path, ASKING)
        assert read.chosen == {"severity": found}
        assert read.knots == knots
        assert json.loads(path.read_text())["format"] == (2 if knots else 1)


def test_without_floors_and_lines_the_file_is_the_one_of_old() -> None:
    assert calibration_bytes({"b": 1.5, "a": 1.0}) == (
        b'{\n  "format": 1,\n  "temperature": {\n    "a": 1.0,\n    "b": 1.5\n  }\n}\n'
    )


@pytest.mark.parametrize(
    ("passed", "wrong", "verdict"),
    [(0, 0, "nothing passes"), (1000, 100, "kept"), (1000, 101, "within chance"), (1000, 200, "broken")],
)
def test_whether_a_target_held_is_said_in_one_word(passed: int, wrong: int, verdict: str) -> None:
    assert Passing(0.5, TARGET, 2000, passed, wrong).verdict == verdict
    assert Passing(0.5, None, 2000, passed, wrong).verdict is None
