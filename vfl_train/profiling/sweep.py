"""The measuring loop of a profile: encode pairs chunk by chunk, ask for base outputs, judge rows.

Pixels are held for the chunk of pairs at hand (and the one before it); what stays of a pair is its tokens.
Later passes encode again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vfl_train.errors import ConfigError, DataError, VflError
from vfl_train.functions.matching import matches
from vfl_train.functions.probes import LoadedPair
from vfl_train.interventions import Branch, Prompt, read_out
from vfl_train.interventions.generation import generate_under
from vfl_train.interventions.readout import Cost
from vfl_train.models.generation import Generated, generate
from vfl_train.profiling.outcomes import Tokens, Trial, settled
from vfl_train.progress import track

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel

MAX_ANSWER_TOKENS = 32
DONOR = "donor"  # the name under which a swap reads the other image
CHUNK = 16  # pairs whose pixels are held at once


@dataclass(frozen=True)
class AnsweredPair:
    """A pair that the untouched model answers right, and how: its own outputs for image a and image b."""

    loaded: LoadedPair
    said_a: Generated
    said_b: Generated
    grids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Direction:
    """One host image of an answered pair (a or b), its donor, both right answers and own outputs."""

    host: Prompt
    donor: Prompt
    own: Generated
    other: Generated
    answer: str
    other_answer: str
    match: str


@dataclass(frozen=True)
class Outcome:
    """`changed`: the output is not the host's own. `flipped`: it is the donor's. `right`: it still gives the
    host's right answer; asked for drops, and the same as not changed for answers judged loosely."""

    changed: bool
    flipped: bool
    right: bool


@dataclass(frozen=True, eq=False)
class Ask:
    """A branch on a direction, with the image that a swap in it reads (None: the pair's other image)."""

    direction: Direction
    branch: Branch
    donor: Prompt | None = None

    @property
    def kinds(self) -> set[str]:
        return {item.kind for item in self.branch}

    @property
    def flips(self) -> bool:
        """Whether the donor's own output is a possible one worth asking for."""
        return self.donor is None and "swap" in self.kinds


@dataclass
class Sweeper:
    """Runs the rows of one function. `batch_tokens`: padded tokens a batch may hold. `cost` counts every
    row; `plain` the token-layers of one plain forward of each answered prompt with its own output, all
    layers but the last, which is the unit that costs are stated in."""

    vlm: VisionLanguageModel
    phase: str
    path: str
    batch_tokens: int
    label: str = ""
    cost: Cost = field(default_factory=Cost)
    plain: int = 0

    # --- pairs -----------------------------------------------------------------------------------

    def encode(self, loaded: LoadedPair) -> tuple[Prompt, Prompt]:
        """The prompts of a pair. Raises ConfigError or DataError naming function and line."""
        where = f"{self.label}: line {loaded.line}"
        try:
            a, b = (self.vlm.prompt(loaded.pair.question, [i]) for i in (loaded.image_a, loaded.image_b))
        except VflError as e:
            kind = DataError if isinstance(e, DataError) else ConfigError
            raise kind(f"{where}: {e.message}", e.fix) from e
        except ValueError as e:  # a processor's own complaint: an image too narrow, a token it does not know
            reason = str(e).strip().splitlines()[0]
            raise DataError(f"{where}: this model's processor refuses the pair: {reason}") from e
        if a.grids != b.grids:
            raise DataError(
                f"{where}: the images get unequal grids, {a.grids} and {b.grids}, and cannot be swapped",
                "make both images of a pair the same size",
            )
        return a, b

    def answered(
        self, pairs: Sequence[LoadedPair]
    ) -> Iterator[list[tuple[AnsweredPair, Direction, Direction]]]:
        """Generate every base output once and yield, chunk by chunk, the pairs answered right under their
        `match`, with both directions."""
        for chunk in self._chunks(pairs, "pairs"):
            prompts = [prompt for loaded in chunk for prompt in self.encode(loaded)]
            outputs = generate(self.vlm, prompts, MAX_ANSWER_TOKENS, self.batch_tokens)
            kept = []
            for i, loaded in enumerate(chunk):
                p, (a, b) = loaded.pair, outputs[2 * i : 2 * i + 2]
                if matches(a.text, p.answer_a, p.match) and matches(b.text, p.answer_b, p.match):
                    found = AnsweredPair(loaded, a, b, prompts[2 * i].grids)
                    kept.append((found, *_directions(found, *prompts[2 * i : 2 * i + 2])))
                    self.plain += sum(
                        (d.host.length + len(d.own.tokens)) * (self.vlm.num_layers - 1) for d in kept[-1][1:]
                    )
            yield kept

    def again(self, pairs: Sequence[AnsweredPair]) -> Iterator[list[tuple[Direction, Direction]]]:
        """Both directions of answered pairs, encoded again chunk by chunk."""
        for chunk in self._chunks(pairs, "pairs again"):
            yield [_directions(found, *self.encode(found.loaded)) for found in chunk]

    def _chunks(self, pairs: Sequence, what: str) -> Iterator[Sequence]:
        starts = range(0, len(pairs), CHUNK)
        for start in track(starts, len(starts), f"{self.label}: {what}, {CHUNK} at a time"):
            yield pairs[start : start + CHUNK]

    # --- outcomes --------------------------------------------------------------------------------

    def outcomes(self, directions: Sequence[Direction], branches: Sequence[Branch]) -> list[list[Outcome]]:
        """[branch][direction]."""
        found = self.judge([Ask(d, branch) for d in directions for branch in branches])
        return [found[i :: len(branches)] for i in range(len(branches))]

    def flips(self, pairs: Sequence[AnsweredPair], branches: Sequence[Branch]) -> list[list[bool]]:
        """[branch][direction]: the output is the donor's own. Only that is asked, so the donor's output is
        forced at once."""
        out: list[list[bool]] = [[] for _ in branches]
        for chunk in self.again(pairs):
            asks = [Ask(d, branch) for both in chunk for d in both for branch in branches]
            found = self.judge(asks, changes=False)
            for i, flipped in enumerate(out):
                flipped += [o.flipped for o in found[i :: len(branches)]]
        return out

    def judge(self, asks: Sequence[Ask], changes: bool = True) -> list[Outcome]:
        """The outcome of every ask, in order; neighbours share work where they have the same prompt.
        `changes`: whether anything but flips is asked for (else `changed` and `right` say nothing)."""
        trials = [_trial(ask, changes) for ask in asks]
        self._force(trials)
        self._generate(
            [
                (trial, ask)
                for trial, ask in zip(trials, asks, strict=True)
                if any(self._verdict(trial, e, ask.direction.match) is None for e in _expected(ask, changes))
            ]
        )
        return [self._outcome(trial, ask) for trial, ask in zip(trials, asks, strict=True)]

    def _force(self, trials: Sequence[Trial]) -> None:
        """Force the trials' outputs round by round until none is left that could hold."""
        ends = self.vlm.eos_token_ids
        while todo := [(t, answer) for t in trials if (answer := t.next_try()) is not None]:
            rows = [trial.row(answer) for trial, answer in todo]
            found = read_out(self.vlm, rows, self.path, self.batch_tokens, self.cost)
            for (trial, answer), read in zip(todo, found, strict=True):
                trial.learn(answer, read, ends, MAX_ANSWER_TOKENS)

    def _generate(self, open_trials: Sequence[tuple[Trial, Ask]]) -> None:
        said = generate_under(
            self.vlm, [trial.row(()) for trial, _ in open_trials], MAX_ANSWER_TOKENS, self.path,
            self.batch_tokens, self.cost, [trial.drafts() for trial, _ in open_trials],
        )  # fmt: skip
        for (trial, _), tokens in zip(open_trials, said, strict=True):
            trial.known, trial.complete = tuple(tokens), True

    def _verdict(self, trial: Trial, expected: str, match: str) -> bool | None:
        """Whether the output gives `expected`; None if what is known does not say."""
        text = self.vlm.decode(trial.known)
        return matches(text, expected, match) if trial.complete else settled(text, expected, match)

    def _outcome(self, trial: Trial, ask: Ask) -> Outcome:
        d = ask.direction
        if d.match != "exact":
            right = bool(self._verdict(trial, d.answer, d.match))
            return Outcome(
                not right, ask.flips and bool(self._verdict(trial, d.other_answer, d.match)), right
            )
        said = trial.known if trial.complete else None
        right = said == d.own.tokens or (
            "drop" in ask.kinds and bool(self._verdict(trial, d.answer, "exact"))
        )
        return Outcome(said != d.own.tokens, ask.flips and said == d.other.tokens, right)


def _directions(found: AnsweredPair, a: Prompt, b: Prompt) -> tuple[Direction, Direction]:
    p = found.loaded.pair
    first = Direction(a, b, found.said_a, found.said_b, p.answer_a, p.answer_b, p.match)
    return first, replace(
        first, host=b, donor=a, own=first.other, other=first.own, answer=p.answer_b, other_answer=p.answer_a
    )


def _trial(ask: Ask, changes: bool) -> Trial:
    d = ask.direction
    named = any(item.donor == DONOR for item in ask.branch)
    donors = {DONOR: ask.donor or d.donor} if named else {}
    tries: tuple[Tokens, ...] = (d.own.tokens,) if changes else ()
    return Trial(d.host, ask.branch, donors, (*tries, d.other.tokens) if ask.flips else tries)


def _expected(ask: Ask, changes: bool) -> list[str]:
    """The answers of which it must be settled whether the output gives them. Equality needs no more than
    the forced outputs, but for a drop's rightness: another wording of the right answer is right."""
    d = ask.direction
    if d.match == "exact":
        return [d.answer] if "drop" in ask.kinds and changes else []
    return ([d.answer] if changes else []) + ([d.other_answer] if ask.flips else [])
