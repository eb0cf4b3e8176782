"""A guess is worth its tokens or is not made; and the memory of answers stays bounded."""

from __future__ import annotations

import pytest

from edge_agent.runtime.drafts import MAX_DRAFT_SCORES, MAX_DRAFT_TOKENS, MAX_NODES, AnswerDrafts, PassCost, Trust

# Two fields: scores are asked for after the opening (1 token) and after the first value with what it forces (4 tokens).
RIGHT = [10, 21, 30, 31, 41, 50]
OTHER = [10, 22, 32, 33, 42, 50]
ASKED = (1, 4)


def chain(drafts: AnswerDrafts, answer: list[int], prompt: list[int]) -> tuple[list[int], list[int]]:
    """Tokens that are guessed one after the other, and after how many of them scores will be asked for."""
    guess = drafts.propose(answer, prompt, alternatives=False)
    assert not guess.has_alternatives
    return list(guess.tokens), [at + 1 for at in guess.asks]


def drafts_of(*answers: list[int], copies: bool = False) -> AnswerDrafts:
    drafts = AnswerDrafts(PassCost(), copies=copies)
    for answer in answers:
        drafts.learn(answer, ASKED)
    return drafts


def test_nothing_is_proposed_before_anything_was_learned() -> None:
    assert chain(AnswerDrafts(PassCost()), [], [1, 2, 3]) == ([], [])


def test_the_usual_answer_is_proposed_up_to_its_last_choice() -> None:
    drafts = drafts_of(*[RIGHT] * 9)
    assert chain(drafts, [10], []) == ([21, 30, 31], [3])
    # Behind the last choice nothing is asked for, so nothing is worth running.
    assert chain(drafts, [10, 21, 30, 31], []) == ([], [])


def test_a_guess_that_is_hardly_ever_right_is_not_made() -> None:
    many = [[10, 100 + n, 30, 31, 41, 50] for n in range(40)]
    assert chain(drafts_of(*many), [10], []) == ([], [])


def tree(
    drafts: AnswerDrafts, answer: list[int], ways: tuple[tuple[int, ...], ...] = ()
) -> list[tuple[list[int], bool]]:
    """Each guess from its first token to where scores are asked for, and whether it follows the answer itself."""
    guess = drafts.propose(answer, [], ways, alternatives=True)
    found = []
    for end in guess.asks:
        segment, at = [guess.tokens[end]], guess.follows[end]
        while at >= 0 and at not in guess.asks:
            segment.append(guess.tokens[at])
            at = guess.follows[at]
        found.append((segment[::-1], at < 0))
    return found


def test_of_two_ways_that_are_known_both_are_tried_unseen() -> None:
    ways = ((21, 30, 31), (22, 32, 33))
    assert sorted(tree(AnswerDrafts(PassCost()), [10], ways)) == [([21, 30, 31], True), ([22, 32, 33], True)]
    assert sorted(tree(AnswerDrafts(PassCost(), remembers=False), [10], ways)) == [(list(way), True) for way in ways]


def test_of_many_ways_none_is_tried_unseen() -> None:
    ways = tuple((20 + number, *range(40)) for number in range(4))
    assert tree(AnswerDrafts(PassCost()), [10], ways) == []


def test_a_way_that_was_never_seen_is_given_up_as_answers_come() -> None:
    drafts, ways = drafts_of(*[RIGHT] * 20), ((21, 30, 31), (22, 32, 33))
    assert tree(drafts, [10], ways) == [([21, 30, 31], True)]


def test_usual_ways_are_tried_side_by_side_the_likeliest_first_and_followed_on() -> None:
    longer = AnswerDrafts(PassCost())
    for number in range(30):
        first, second = ([21, 30], [22, 32]) if number % 5 else ([22, 32], [21, 30])
        longer.learn([10, *first, 41, 42, 50], (1, 3, 5))
        longer.learn([10, *second, 43, 44, 50], (1, 3, 5)) if number % 2 else None
    found = tree(longer, [10])
    assert [segment for segment, is_first in found if is_first] == [[21, 30], [22, 32]]
    assert [segment for segment, is_first in found if not is_first], "what follows the likeliest is guessed as well"
    guess = longer.propose([10], [], alternatives=True)
    assert guess.tokens[:2] == (21, 30), "the likeliest way lies where it would lie alone"
    assert guess.follows[:2] == (-1, 0)


def test_a_memory_that_is_switched_off_learns_nothing() -> None:
    drafts = AnswerDrafts(PassCost(), remembers=False)
    for _ in range(9):
        drafts.learn(RIGHT, ASKED)
    assert tree(drafts, [10]) == []


def test_a_tree_is_bounded() -> None:
    ways = ((21, *range(100, 159)), (22, *range(200, 259)))
    cost = PassCost()
    for tokens in (1, 7, 45, 3, 70, 9, 20, 45, 8, 60):
        cost.learn(tokens, 0.001 * (64 + 0.1 * tokens))
    guess = AnswerDrafts(cost, remembers=False).propose([10], [], ways, alternatives=True)
    assert 60 == len(guess.tokens) <= MAX_DRAFT_TOKENS, "both would be worth it, and only one fits"
    assert len(guess.asks) <= MAX_DRAFT_SCORES


def test_a_tree_that_is_cut_keeps_only_what_is_whole() -> None:
    ways = ((21, 30, 31), (22, 32, 33))
    guess = AnswerDrafts(PassCost(), remembers=False).propose([10], [], ways, alternatives=True)
    cut = guess.first(4)
    assert (len(cut.tokens), len(cut.follows), cut.asks) == (4, 4, (2,))
    assert guess.first(3).has_alternatives is False


def test_an_answer_that_was_never_given_has_no_continuation() -> None:
    assert chain(drafts_of(RIGHT), [10, 99], []) == ([], [])


def test_what_follows_depends_on_what_was_chosen() -> None:
    drafts = drafts_of(*[RIGHT] * 5, *[OTHER] * 4)
    third = [10, 22, 32, 33, 43, 50]
    for _ in range(20):
        drafts.learn(third, ASKED)
    assert chain(drafts, [10], [])[0] == [22, 32, 33]


def of_two_machines() -> AnswerDrafts:
    """One machine's events were answered one way, another's the other way, and most events were a third one's."""
    drafts = AnswerDrafts(PassCost())
    for number in range(60):
        drafts.learn([10, 23, 34, 35, 43, 50], ASKED, [1, 2, 300, 301, 302, 900 + number])
        if number % 4 == 0:
            drafts.learn(RIGHT, ASKED, [1, 2, 100, 101, 102, 500 + number])
            drafts.learn(OTHER, ASKED, [1, 2, 200, 201, 202, 700 + number])
    return drafts


def test_an_event_is_guessed_to_be_answered_as_those_that_it_is_like() -> None:
    drafts = of_two_machines()
    assert chain(drafts, [10], [1, 2, 100, 101, 102])[0] == RIGHT[1:4]
    assert chain(drafts, [10], [1, 2, 200, 201, 202])[0] == OTHER[1:4]
    assert chain(drafts, [10], [1, 2, 100, 101, 102, 501])[0] == RIGHT[1:4]


def test_an_event_that_is_like_none_is_guessed_to_be_answered_as_usual() -> None:
    assert chain(of_two_machines(), [10], [1, 2, 400, 401, 402])[0] == [23, 34, 35]


def test_what_an_answer_to_a_like_event_was_does_not_count_where_the_answer_went_another_way() -> None:
    drafts = of_two_machines()
    assert chain(drafts, [10, 22], [1, 2, 100, 101, 102])[0] == [32, 33]


def test_usual_answers_do_not_drown_out_those_to_like_events() -> None:
    drafts = of_two_machines()
    for number in range(5_000):
        drafts.learn([10, 23, 34, 35, 43, 50], ASKED, [1, 2, 300, 301, 302, 900 + number])
    drafts.learn(OTHER, ASKED, [1, 2, 200, 201, 202, 5])
    assert chain(drafts, [10], [1, 2, 200, 201, 202])[0] == OTHER[1:4]


def test_guesses_that_keep_failing_are_made_no_more_though_the_memory_is_sure_of_them() -> None:
    # Events of five kinds, and no answer is ever given twice: what was answered to the same event looks certain.
    drafts = AnswerDrafts(PassCost())
    for number in range(60):
        kind = number % 5
        drafts.learn([10, 100 + number, 30, 31, 41, 50], ASKED, [1, 2, 300 + kind, 400 + kind])
    assert chain(drafts, [10], [1, 2, 300, 400]) == ([], [])


def test_a_chance_is_worth_what_such_chances_came_to() -> None:
    trust = Trust()
    assert trust.of(0.9) == pytest.approx(0.9)
    for number in range(400):
        trust.learn(0.9, is_true=number % 2 == 0)
    assert trust.of(0.9) == pytest.approx(0.5, abs=0.05)
    assert trust.of(0.3) == pytest.approx(0.3), "of others nothing is known"
    for _ in range(200):
        trust.learn(0.9, is_true=True)
    assert trust.of(1.0) > 0.95, "what was long ago counts no more"


def test_memory_of_answers_is_bounded_when_no_two_are_alike() -> None:
    drafts = AnswerDrafts(PassCost())
    for n in range(2 * MAX_NODES):
        drafts.learn([10, n % 7, 1000 + n, 5], (1, 2))
        assert drafts.nodes <= MAX_NODES + 4


def test_halving_keeps_what_is_usual() -> None:
    drafts = AnswerDrafts(PassCost())
    for n in range(MAX_NODES):
        drafts.learn(RIGHT, ASKED)
        drafts.learn([11, 1000 + n], (1,))
    assert chain(drafts, [10], []) == ([21, 30, 31], [3])


def test_words_of_the_event_are_proposed_where_an_answer_repeats_it() -> None:
    drafts = AnswerDrafts(PassCost(), copies=True)
    prompt = [1, 2, 3, 4, 5, 6]
    assert chain(drafts, [10, 2, 3], prompt) == ([4, 5, 6], [1, 2, 3])
    assert chain(drafts, [10, 3, 2], prompt) == ([], [])
    assert chain(AnswerDrafts(PassCost()), [10, 2, 3], prompt) == ([], [])


def test_copying_stops_where_it_does_not_pay() -> None:
    drafts = AnswerDrafts(PassCost(), copies=True)
    prompt = [1, 2, 3, 4, 5, 6]
    for n in range(200):
        drafts.learn([2, 3, 1000 + n], (2,), prompt)
    assert chain(drafts, [10, 2, 3], prompt) == ([], [])


@pytest.mark.parametrize("fixed", [2.0, 20.0])
def test_fixed_cost_of_a_pass_is_found_by_measuring(fixed: float) -> None:
    cost = PassCost()
    for tokens in (1, 7, 45, 3, 70, 9, 20, 45, 8, 60):
        cost.learn(tokens, 0.001 * (fixed + tokens))
    assert cost.fixed_tokens == pytest.approx(fixed, rel=0.01)


def test_passes_of_one_length_tell_nothing_about_the_fixed_cost() -> None:
    cost = PassCost()
    for _ in range(50):
        cost.learn(7, 0.01)
    assert cost.fixed_tokens == PassCost().fixed_tokens


def test_a_clock_that_jumps_leaves_a_usable_estimate() -> None:
    cost = PassCost()
    for tokens, seconds in ((1, 5.0), (70, 0.0), (7, 0.0), (45, 0.001), *[(9, 0.0)] * 10):
        cost.learn(tokens, seconds)
    assert 1.0 <= cost.fixed_tokens <= 64.0


def test_a_guess_that_saves_a_share_of_a_pass_is_worth_fewer_tokens() -> None:
    cost = PassCost()
    for tokens in (10, 30, 50, 70) * 4:
        cost.learn(tokens, 0.001 * (20 + tokens))
    drafts = AnswerDrafts(cost)
    for answer in [RIGHT, OTHER] * 20:  # 3 tokens that are right about every other time
        drafts.learn(answer, ASKED)
    alone, in_company = (drafts.propose([10], [], alternatives=False, company=count) for count in (1, 16))
    assert len(alone.tokens) == 3
    assert in_company.tokens == ()
