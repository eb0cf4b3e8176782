"""Guesses at the rest of an answer, so that one pass can check what several would have found out.

Four sources, all free of charge: what this task answered to events much like this one (`similar_events`), what it
answered to any, what it may answer at all (of a yes and a no, one is right), and, in free text, the event's own words.
Whether a guess is worth its tokens follows from how likely it is and from what a pass and a token cost on this very
machine, measured as events go by. Where the graph takes alternatives, several guesses share a pass. A guess is checked
like any other text, so it never changes an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_agent.runtime.similar_events import Similar, SimilarEvents

MAX_NODES = 5_000
"""Tokens of remembered answers; beyond it the memory is halved. Some 2 MB."""
MAX_DRAFT_TOKENS = 96
MAX_DRAFT_SCORES = 24
LOOKUP_TOKENS = 2
"""How many tokens of an answer must stand in the event before the words after them are proposed."""
COPIED_TOKENS = 8
_DECAY = 0.98
_USUAL = 64.0
"""Answers that what was answered to any event counts for, however often that was: it must not drown out the next."""
_SIMILAR = 200.0
"""Answers that the answer to an event of the very same tokens counts for."""
_STEPS = 6
_DOUBT = 4.0
"""Outcomes that a chance by itself counts for."""
_SLIGHT = 0.15
"""Chances below are not followed up."""
_FEWEST_PASSES = 8
_INITIAL_FIXED_TOKENS = 12.0


@dataclass(frozen=True)
class Guess:
    """What may follow an answer so far, as a tree.

    Args:
        tokens: ids; a token comes after the one that it follows.
        follows: for each token the place of the token that it follows; -1: the answer so far.
        asks: places of the tokens after which scores will be asked for, ascending.
    """

    tokens: tuple[int, ...] = ()
    follows: tuple[int, ...] = ()
    asks: tuple[int, ...] = ()

    @property
    def has_alternatives(self) -> bool:
        """Whether any two tokens follow the same one."""
        return self.follows != tuple(range(-1, len(self.tokens) - 1))

    def first(self, count: int) -> Guess:
        """No more than its first ``count`` tokens."""
        return Guess(self.tokens[:count], self.follows[:count], tuple(at for at in self.asks if at < count))


NOTHING = Guess()


class PassCost:
    """What a pass costs on this machine: a fixed part, and a part for each token; least squares over recent passes."""

    def __init__(self) -> None:
        self._passes = 0
        self._weight = self._n = self._t = self._nn = self._nt = 0.0

    def learn(self, tokens: int, seconds: float) -> None:
        """Take a pass into account.

        Args:
            tokens: that it computed, padding included.
            seconds: that it took.
        """
        self._passes += 1
        self._weight = self._weight * _DECAY + 1.0
        self._n = self._n * _DECAY + tokens
        self._t = self._t * _DECAY + seconds
        self._nn = self._nn * _DECAY + tokens * tokens
        self._nt = self._nt * _DECAY + tokens * seconds

    @property
    def fixed_tokens(self) -> float:
        """How many tokens cost as much as the fixed part of a pass, at least 1."""
        spread = self._weight * self._nn - self._n * self._n
        if self._passes < _FEWEST_PASSES or spread <= 0:
            return _INITIAL_FIXED_TOKENS
        per_token_s = (self._weight * self._nt - self._n * self._t) / spread
        fixed_s = (self._t - per_token_s * self._n) / self._weight
        if per_token_s <= 0 or fixed_s <= 0:
            return _INITIAL_FIXED_TOKENS if per_token_s <= 0 else 1.0
        return max(1.0, min(64.0, fixed_s / per_token_s))


@dataclass(slots=True)
class _Node:
    """A place in the tree of answers: how often it was reached, and whether scores were asked for there."""

    visits: int = 0
    asked: bool = False
    after: dict[int, _Node] = field(default_factory=dict)


class _Growing:
    """A guess in the making.

    Args:
        alternatives: whether tokens may follow the same one.
        fixed_tokens: tokens that cost as much as the fixed part of a pass.
    """

    def __init__(self, *, alternatives: bool, fixed_tokens: float) -> None:
        self.alternatives = alternatives
        self.fixed_tokens = fixed_tokens
        self.least_chance = 1.0 / (1.0 + fixed_tokens)  # of which not even a single token pays
        self._in_line = 0
        self.tokens: list[int] = []
        self.follows: list[int] = []
        self.asks: list[int] = []

    def has_room(self, tokens: int) -> bool:
        """Whether so many more tokens, and a place where scores are asked for, are within the limits."""
        return len(self.tokens) + tokens <= MAX_DRAFT_TOKENS and len(self.asks) < MAX_DRAFT_SCORES

    def goes_on_at(self, place: int) -> bool:
        """Whether what follows the token at ``place`` would lie where it lies without a guess beside it."""
        return place + 1 == self._in_line == len(self.tokens)

    def add(self, place: int, segment: Sequence[int]) -> int:
        """Let ``segment`` follow the token at ``place``; returns the place of its last token."""
        if self.goes_on_at(place):
            self._in_line += len(segment)
        for token in segment:
            self.tokens.append(token)
            self.follows.append(place)
            place = len(self.tokens) - 1
        self.asks.append(place)
        return place


def _until_asked(node: _Node, token: int) -> tuple[list[int], _Node]:
    """The likeliest way from ``node`` by ``token`` up to where scores are asked for, or to where nothing follows."""
    segment = [token]
    node = node.after[token]
    while not node.asked and node.after:
        ways = node.after.items()
        token, node = next(iter(ways)) if len(ways) == 1 else max(ways, key=lambda item: item[1].visits)
        segment.append(token)
    return segment, node


def _pays(likely: float, tokens: int, fixed_tokens: float, *, runs_again: bool = False) -> bool:
    """Whether a guess saves more than it wastes: right, it saves a pass; wrong, its tokens were for nothing."""
    wasted = 1.0 if runs_again else 1.0 - likely
    return likely * fixed_tokens > wasted * tokens


class Trust:
    """How often what was taken to be so likely came true: a memory of a few answers takes too much for certain."""

    def __init__(self) -> None:
        self._true = [0.0] * _STEPS
        self._seen = [0.0] * _STEPS

    def learn(self, chance: float, *, is_true: bool) -> None:
        """Take into account what became of a chance, 0 to 1."""
        step = self._step(chance)
        self._true[step] = self._true[step] * _DECAY + is_true
        self._seen[step] = self._seen[step] * _DECAY + 1.0

    def of(self, chance: float) -> float:
        """What a chance is worth; itself, where little is known of such ones."""
        step = self._step(chance)
        return (self._true[step] + _DOUBT * chance) / (self._seen[step] + _DOUBT)

    @staticmethod
    def _step(chance: float) -> int:
        return min(int(chance * _STEPS), _STEPS - 1)


@dataclass(slots=True)
class _Place:
    """Where a guess may go on.

    Args:
        node: of the tree of answers.
        length: tokens of the answer up to here.
        similar: answers to similar events that have come this way.
        likely: the chance that the answer comes this way.
    """

    node: _Node
    length: int
    similar: Similar
    likely: float

    def chances(self, ways: Sequence[Sequence[int]] = ()) -> dict[int, float]:
        """The chance of each token that may follow, once the answer has come here.

        Args:
            ways: that are known to be possible.
        """
        counts = dict.fromkeys((way[0] for way in ways), 1.0 / len(ways) if ways else 0.0)
        # A share of one answer for each way that is known: what was seen once is not certain, and what was never seen
        # is not impossible.
        whole = 1.0
        if self.node.visits:
            usual = min(self.node.visits, _USUAL)
            whole += usual
            for token, following in self.node.after.items():
                counts[token] = counts.get(token, 0.0) + usual * following.visits / self.node.visits
        for likeness, answer in self.similar:
            if self.length < len(answer) and answer[self.length] in self.node.after:
                counts[answer[self.length]] += _SIMILAR * likeness
                whole += _SIMILAR * likeness
        return {token: count / whole for token, count in counts.items()}


def _continuing(similar: Similar, length: int, segment: Sequence[int]) -> Similar:
    """Those of the answers that go on with ``segment`` after ``length`` tokens."""
    wanted, end = tuple(segment), length + len(segment)
    return tuple(one for one in similar if one[1][length:end] == wanted)


class AnswerDrafts:
    """What one task answered so far, as a tree of tokens.

    Args:
        cost: of passes, shared by all tasks of a model.
        copies: whether the task has free text, in which the event's words may be repeated.
        remembers: whether answers are remembered at all; else each way on is as likely as any other.
    """

    def __init__(self, cost: PassCost, *, copies: bool = False, remembers: bool = True) -> None:
        self._cost = cost
        self._copies = copies and remembers
        self._remembers = remembers
        self._root = _Node()
        self._nodes = 1
        self._events = SimilarEvents()
        self._trust = Trust()
        self._copied = self._copied_right = 1.0

    @property
    def nodes(self) -> int:
        """Tokens that are remembered."""
        return self._nodes

    def learn(self, answer: Sequence[int], asked: Sequence[int], prompt: Sequence[int] = ()) -> None:
        """Remember an answer.

        Args:
            answer: its token ids.
            asked: numbers of its tokens after which scores were asked for.
            prompt: token ids of its event.
        """
        if not self._remembers:
            return
        if self._nodes > MAX_NODES:
            self._halve()
        places = frozenset(asked)
        self._learn_trust(answer, places, prompt)
        node = self._root
        for length in range(len(answer) + 1):
            node.visits += 1
            node.asked = node.asked or length in places
            if length == len(answer):
                break
            following = node.after.get(answer[length])
            if following is None:
                following = node.after[answer[length]] = _Node()
                self._nodes += 1
            node = following
        self._events.learn(prompt, answer)
        if self._copies:
            self._learn_copies(answer, places, prompt)

    def propose(
        self,
        answer: Sequence[int],
        prompt: Sequence[int],
        ways: Sequence[Sequence[int]] = (),
        *,
        alternatives: bool,
        company: int = 1,
    ) -> Guess:
        """What may follow.

        Args:
            answer: token ids so far.
            prompt: token ids of the event.
            ways: the ways on from here as far as they are known, each up to where scores are asked for next.
            alternatives: whether several guesses at the same token may be made.
            company: answers that are to be found together: each saves its share of a pass only.

        Returns:
            A guess, empty where none pays.
        """
        node: _Node | None = self._root
        for token in answer:
            node = node.after.get(token) if node else None
        fixed_tokens = self._cost.fixed_tokens / company
        guess = _Growing(alternatives=alternatives, fixed_tokens=fixed_tokens)
        similar = _continuing(self._events.to(prompt), 0, answer)
        self._grow(guess, -1, _Place(node or _Node(), len(answer), similar, 1.0), ways)
        if not guess.tokens and self._copies:
            return self._from_event(answer, prompt, fixed_tokens)
        return Guess(tuple(guess.tokens), tuple(guess.follows), tuple(sorted(guess.asks)))

    def _grow(self, guess: _Growing, at: int, place: _Place, ways: Sequence[Sequence[int]]) -> None:
        """Add what follows ``place``, which the guess holds at ``at``, the likeliest first."""
        unseen = {way[0]: way for way in ways if way[0] not in place.node.after}
        chances = ((place.likely * self._trust.of(one), token) for token, one in place.chances(ways).items())
        worth = sorted((one for one in chances if one[0] > guess.least_chance), reverse=True)
        for chance, token in worth if guess.alternatives else worth[:1]:
            segment, end = (list(unseen[token]), None) if token in unseen else _until_asked(place.node, token)
            if end is not None and not end.asked:
                continue  # nothing is asked for behind it
            # Behind another guess it is run again even when it was right. Of ways that nobody has taken yet none is
            # likelier, though: both are tried, lest the one that is not be the usual one.
            runs_again = self._remembers and not guess.goes_on_at(at)
            pays = _pays(chance, len(segment), guess.fixed_tokens, runs_again=runs_again)
            if not pays or not guess.has_room(len(segment)):
                continue
            last = guess.add(at, segment)
            if end is not None:
                similar = _continuing(place.similar, place.length, segment)
                self._grow(guess, last, _Place(end, place.length + len(segment), similar, chance), ())

    def _from_event(self, answer: Sequence[int], prompt: Sequence[int], fixed_tokens: float) -> Guess:
        """The words that follow in the event where the answer's last words stand (prompt lookup decoding)."""
        copied = _continuation(answer, prompt)
        if not copied or not _pays(self._copied_right / self._copied, 1, fixed_tokens):
            return NOTHING
        places = range(len(copied))
        return Guess(tuple(copied), tuple(place - 1 for place in places), tuple(places))

    def _learn_trust(self, answer: Sequence[int], asked: frozenset[int], prompt: Sequence[int]) -> None:
        # What would have been guessed at every choice, whether it was guessed there or not.
        node, similar = self._root, self._events.to(prompt)
        for length, token in enumerate(answer):
            if length in asked:
                for following, chance in _Place(node, length, similar, 1.0).chances().items():
                    if chance > _SLIGHT:
                        self._trust.learn(chance, is_true=following == token)
            if token not in node.after:
                return
            similar = _continuing(similar, length, [token])
            node = node.after[token]

    def _learn_copies(self, answer: Sequence[int], asked: frozenset[int], prompt: Sequence[int]) -> None:
        # Counted over every place where a word was chosen, whether it was proposed there or not.
        for place in sorted(asked):
            if copied := _continuation(answer[:place], prompt):
                self._copied = self._copied * _DECAY + 1.0
                self._copied_right = self._copied_right * _DECAY + (copied[0] == answer[place])

    def _halve(self) -> None:
        """Forget the rarer half, and let the rest count for half of what it did."""
        kept = 0
        pending = [self._root]
        while pending:
            node = pending.pop()
            kept += 1
            node.visits //= 2
            node.after = {token: child for token, child in node.after.items() if child.visits > 1}
            pending.extend(node.after.values())
        if kept > MAX_NODES // 2:  # nothing was rare: begin anew
            self._root, kept = _Node(), 1
        self._nodes = kept


def _continuation(answer: Sequence[int], prompt: Sequence[int]) -> list[int]:
    """Tokens of ``prompt`` after the latest place where the last tokens of ``answer`` stand."""
    if len(answer) < LOOKUP_TOKENS:
        return []
    wanted = list(answer[-LOOKUP_TOKENS:])
    for start in range(len(prompt) - LOOKUP_TOKENS - 1, -1, -1):
        if list(prompt[start : start + LOOKUP_TOKENS]) == wanted:
            begin = start + LOOKUP_TOKENS
            return list(prompt[begin : begin + COPIED_TOKENS])
    return []
