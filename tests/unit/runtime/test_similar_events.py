"""What an event is like is found by what few others have, and the memory of events stays bounded."""

from __future__ import annotations

import random

from edge_agent.runtime.similar_events import MAX_EVENTS, MOST_SIMILAR, SimilarEvents

LABELS = [1, 2, 3, 4]
PRESS, MILL, OVEN = [10, 11, 12], [20, 21, 22], [30, 31, 32]


def event(machine: list[int], *rest: int) -> list[int]:
    return [*LABELS[:2], *machine, *LABELS[2:], *rest]


def remembering(*learned: tuple[list[int], list[int]]) -> SimilarEvents:
    events = SimilarEvents()
    for tokens, answer in learned:
        events.learn(tokens, answer)
    return events


def test_nothing_is_like_an_event_before_others_came() -> None:
    assert SimilarEvents().to(event(PRESS, 90)) == ()


def test_what_one_machine_was_answered_is_found_by_its_next_event() -> None:
    events = remembering((event(PRESS, 90), [5, 6]), (event(MILL, 91), [5, 7]), (event(OVEN, 92), [5, 8]))
    likeness, answer = events.to(event(MILL, 93))[0]
    assert answer == (5, 7)
    assert 0.5 < likeness < 1.0, "its last token is new, which tells little"


def test_an_event_of_which_most_is_new_is_like_none() -> None:
    events = remembering((event(PRESS, 90), [5, 6]), (event(MILL, 91), [5, 7]), (event(OVEN, 92), [5, 8]))
    assert events.to(event([40, 41, 42], *range(60, 80), 91)) == ()


def test_an_event_that_comes_again_is_entirely_like_itself() -> None:
    events = remembering((event(PRESS, 90), [5, 6]), (event(MILL, 91), [5, 7]), (event(OVEN, 92), [5, 8]))
    assert events.to(event(OVEN, 92))[0] == (1.0, (5, 8))


def test_labels_that_every_event_has_make_none_alike() -> None:
    events = remembering(*((event([100 + n], 200 + n), [5, n]) for n in range(20)))
    assert events.to(event([300], 400)) == ()
    assert events.to(LABELS) == ()
    assert events.to([]) == ()


def test_only_the_events_that_are_most_like_it_are_told_the_likest_first() -> None:
    # Of the tokens that few events have, each event shares one more with the one that is asked about.
    rare = list(range(50, 58))
    learned = [(event([200 + n], *rare[: n % 9]), [5, n]) for n in range(90)]
    found = remembering(*learned).to(event([999], *rare))
    assert 0 < len(found) <= MOST_SIMILAR
    assert [likeness for likeness, _ in found] == sorted((likeness for likeness, _ in found), reverse=True)
    assert found[0][1][1] % 9 == 8


def test_the_oldest_events_are_forgotten_without_a_trace() -> None:
    chance = random.Random(3)
    events = SimilarEvents()
    for number in range(3 * MAX_EVENTS):
        events.learn(event([1000 + number], chance.randrange(50, 99)), [5, number])
        assert len(events) <= MAX_EVENTS
    assert events.to(event([1000])) == ()
    assert events.to(event([1000 + 3 * MAX_EVENTS - 1]))[0][1] == (5, 3 * MAX_EVENTS - 1)
    assert events.remembered_tokens() <= MAX_EVENTS + 50 + len(LABELS)


def test_what_was_found_before_an_answer_was_learned_is_not_told_after_it() -> None:
    events = remembering((event(PRESS, 90), [5, 6]), (event(MILL, 91), [5, 7]), (event(OVEN, 92), [5, 8]))
    assert events.to(event(MILL, 93))[0][1] == (5, 7)
    events.learn(event(MILL, 93), [5, 9])
    assert events.to(event(MILL, 93))[0] == (1.0, (5, 9))
