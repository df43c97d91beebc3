"""The measuring loop of a profile: encode pairs chunk by chunk, ask for base outputs, judge rows.

What the model gets of the images is held for the chunk of pairs at hand (and the one before it); what stays
of a pair is its tokens, and of pairs that were drawn (not read from a folder) their pictures. Later passes
encode again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

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

T = TypeVar("T")
MAX_ANSWER_TOKENS = 32
MAX_BOX_TOKENS = 64  # of answers judged by `iou`: a box in JSON takes more than 32
DONOR = "donor"  # the name under which a swap reads the other image
# Pairs encoded at a time, and how many prompt tokens are enough: bounds the pixels held in memory (about
# 20 kB for each image token of a Qwen2.5-VL).
CHUNK, CHUNK_TOKENS = 16, 32768


def answer_cap(match: str) -> int:
    """The longest output, in tokens, of a pair judged by `match`."""
    return MAX_BOX_TOKENS if match == "iou" else MAX_ANSWER_TOKENS


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

    @property
    def cap(self) -> int:
        """Its longest output, in tokens."""
        return answer_cap(self.match)


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
            a, b = (self.vlm.prompt(loaded.pair.question, *s) for s in (loaded.shown_a, loaded.shown_b))
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
        `match`, with both directions. An output that holds a placeholder counts as wrong: it cannot be
        forced, for no image stands behind it."""
        placeholders = {*self.vlm.placeholder_ids}
        for chunk in self._chunks([(p, p) for p in pairs], "pairs"):
            kept = []
            for (loaded, *prompts), (a, b) in zip(chunk, self._own_outputs(chunk), strict=True):
                p = loaded.pair
                right = matches(a.text, p.answer_a, p.match) and matches(b.text, p.answer_b, p.match)
                if right and not placeholders & {*a.tokens, *b.tokens}:
                    found = AnsweredPair(loaded, a, b, prompts[0].grids)
                    kept.append((found, *_directions(found, *prompts)))
                    self.plain += sum(
                        (d.host.length + len(d.own.tokens)) * (self.vlm.num_layers - 1) for d in kept[-1][1:]
                    )
            yield kept

    def _own_outputs(
        self, chunk: Sequence[tuple[LoadedPair, Prompt, Prompt]]
    ) -> list[tuple[Generated, Generated]]:
        """The untouched model's outputs for both images of each pair."""
        caps = [answer_cap(loaded.pair.match) for loaded, _, _ in chunk]
        said: dict[int, tuple[Generated, Generated]] = {}
        for cap in sorted(set(caps)):
            members = [i for i in range(len(chunk)) if caps[i] == cap]
            prompts = [prompt for i in members for prompt in chunk[i][1:]]
            outputs = generate(self.vlm, prompts, cap, self.batch_tokens)
            said.update(zip(members, zip(outputs[::2], outputs[1::2], strict=True), strict=True))
        return [said[i] for i in range(len(chunk))]

    def again(self, pairs: Sequence[AnsweredPair]) -> Iterator[list[tuple[Direction, Direction]]]:
        """Both directions of answered pairs, encoded again chunk by chunk."""
        for chunk in self._chunks([(found, found.loaded) for found in pairs], "pairs again"):
            yield [_directions(*each) for each in chunk]

    def _chunks(
        self, pairs: Sequence[tuple[T, LoadedPair]], what: str
    ) -> Iterator[list[tuple[T, Prompt, Prompt]]]:
        """Whatever stands for the pairs with their prompts; a chunk is full with CHUNK pairs, or with
        CHUNK_TOKENS tokens."""
        chunk: list[tuple[T, Prompt, Prompt]] = []
        tokens = 0
        for item, loaded in track(pairs, len(pairs), f"{self.label}: {what}"):
            a, b = self.encode(loaded)
            chunk.append((item, a, b))
            tokens += a.length + b.length
            if len(chunk) >= CHUNK or tokens >= CHUNK_TOKENS:
                yield chunk
                chunk, tokens = [], 0
        if chunk:
            yield chunk

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
        trials = [(_trial(ask, changes), ask) for ask in asks]
        self._force(trials)
        unsettled = [
            (trial, ask)
            for trial, ask in trials
            if any(self._verdict(trial, e, ask.direction.match) is None for e in _expected(ask, changes))
        ]
        for cap in sorted({ask.direction.cap for _, ask in unsettled}):
            self._generate([trial for trial, ask in unsettled if ask.direction.cap == cap], cap)
        return [self._outcome(trial, ask) for trial, ask in trials]

    def _force(self, trials: Sequence[tuple[Trial, Ask]]) -> None:
        """Force the trials' outputs round by round until none is left that could hold."""
        ends = self.vlm.eos_token_ids
        while todo := [(t, a, ask) for t, ask in trials if (a := t.next_try()) is not None]:
            rows = [trial.row(answer) for trial, answer, _ in todo]
            found = read_out(self.vlm, rows, self.path, self.batch_tokens, self.cost)
            for (trial, answer, ask), read in zip(todo, found, strict=True):
                trial.learn(answer, read, ends, ask.direction.cap)

    def _generate(self, trials: Sequence[Trial], cap: int) -> None:
        said = generate_under(
            self.vlm, [trial.row(()) for trial in trials], cap, self.path,
            self.batch_tokens, self.cost, [trial.drafts() for trial in trials],
        )  # fmt: skip
        for trial, tokens in zip(trials, said, strict=True):
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
