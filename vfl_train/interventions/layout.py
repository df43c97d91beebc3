"""How the engine lays out a batch: prompts with a prefix each, trunks, and the rows that branch off them.

A *prefix* is everything of a prompt before its first bound token; rows of one prompt share it. A *trunk* is
the untouched suffix of a prompt with one forced context; a row computes nothing of its own below the first
layer that its branch touches and starts there from its trunk's hidden state (the triangle).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from vfl_train.interventions.intervention import NOISE, WHOLE_SEQUENCE, Intervention
from vfl_train.interventions.readout import Prompt, Row

Source = list[int]  # of each span: -1 dropped, n read from prompt n, this row's prompt: plain


@dataclass(frozen=True)
class Trunk:
    """Suffix tokens of prompt number `prompt`, then `context` (answer tokens that are fed)."""

    prompt: int
    context: tuple[int, ...]


@dataclass
class Place:
    """Where a row's numbers come from. `slot`: its place in the batch of suffixes; `touched`: per layer the
    source of each span and the first bound suffix token."""

    row: Row
    trunk: int
    touched: dict[int, tuple[Source, int]] = field(default_factory=dict)
    slot: int = -1

    @property
    def first(self) -> int:
        """The layer at which this row leaves its trunk."""
        return min(self.touched)


def why_not(row: Row) -> str | None:
    """Why the engine cannot run a row exactly, or None."""
    if not row.prompt.spans:
        return "no image in the prompt"
    if any(item.kind in WHOLE_SEQUENCE for item in row.branch):
        return "an intervention on whole sequences beside one on images"
    end = row.prompt.spans[-1][1]
    if any(item.first_bound(row.prompt) < end for item in row.branch if item.touched(row.prompt)):
        return "text between images is bound"
    if min(row.read_positions()) < end:
        return "an answer before the last image"
    return None


class Layout:
    """The layout of `rows` (all of which the engine can run)."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.prompts: list[Prompt] = []
        self.numbers: dict[int, int] = {}
        for prompt in (*(r.prompt for r in rows), *(d for r in rows for d in r.donors.values())):
            if id(prompt) not in self.numbers:
                self.numbers[id(prompt)] = len(self.prompts)
                self.prompts.append(prompt)
        self.prefix = [p.spans[-1][1] for p in self.prompts]
        for number in {self.numbers[id(r.prompt)] for r in rows}:
            mine = [r for r in rows if self.numbers[id(r.prompt)] == number]
            self.prefix[number] = min(_prefix_end(r) for r in mine)
        self.trunks: list[Trunk] = []
        self.noisy: list[int] = []  # prompts whose noise is some row's donor
        trunk_of: dict[Trunk, int] = {}
        self.places = [self._place(row, trunk_of) for row in rows]
        self._assign_slots()

    # --- what the engine asks --------------------------------------------------------------------

    @property
    def banks(self) -> list[int]:
        """Prompt number of each set of prefix keys: the prompts' own, then those with noise in the spans."""
        return [*range(len(self.prompts)), *self.noisy]

    @property
    def spans(self) -> list[list[tuple[int, int]]]:
        """[banks][K] spans, padded with empty ones."""
        count = max(len(p.spans) for p in self.prompts)
        own = [[*p.spans, *[(0, 0)] * (count - len(p.spans))] for p in self.prompts]
        return [own[n] for n in self.banks]

    def tokens(self, trunk: Trunk) -> int:
        """Suffix tokens of a trunk."""
        return self.prompts[trunk.prompt].length - self.prefix[trunk.prompt] + len(trunk.context)

    def longest_context(self, prompt: int) -> tuple[int, ...]:
        """The longest context forced after a prompt (empty for mere donors)."""
        return max((t.context for t in self.trunks if t.prompt == prompt), key=len, default=())

    def active(self, layer: int) -> int:
        """Slots in use at a layer: trunks, then rows in the order in which they leave them."""
        return len(self.trunks) + sum(p.first <= layer for p in self.branched)

    def suffix_positions(self, place: Place) -> list[int]:
        """The suffix positions at which a row is read."""
        start = self.prefix[self.slot_prompts[place.slot]]
        return [p - start for p in place.row.read_positions()]

    def sources(self, layer: int, slots: int) -> tuple[list[Source], list[int]]:
        """(source of each span, first bound suffix token) of each of the first `slots` slots."""
        count = max(len(p.spans) for p in self.prompts)
        source = [[n] * count for n in self.slot_prompts[:slots]]
        start = [0] * slots
        for place in self.branched:
            if place.slot < slots and layer in place.touched:
                edited, start[place.slot] = place.touched[layer]
                source[place.slot][: len(edited)] = edited
        return source, start

    # --- building --------------------------------------------------------------------------------

    def _place(self, row: Row, trunk_of: dict[Trunk, int]) -> Place:
        number = self.numbers[id(row.prompt)]
        trunk = Trunk(number, row.answer[: max(row.read_positions()) + 1 - row.prompt.length])
        if trunk not in trunk_of:
            trunk_of[trunk] = len(self.trunks)
            self.trunks.append(trunk)
        place = Place(row, trunk_of[trunk])
        for item in row.branch:
            if not item.touched(row.prompt):
                continue
            # Where the answer ends before the first bound token, none of it is bound.
            start = min(item.first_bound(row.prompt) - self.prefix[number], self.tokens(trunk))
            for layer in item.layers:
                plain = [number] * len(row.prompt.spans)
                source, _ = place.touched.setdefault(layer, (plain, start))
                for span in item.touched(row.prompt):
                    source[span] = self._donor(row, item)
        return place

    def _donor(self, row: Row, item: Intervention) -> int:
        if item.kind == "drop":
            return -1
        if item.donor != NOISE:
            return self.numbers[id(row.donors[str(item.donor)])]
        number = self.numbers[id(row.prompt)]
        if number not in self.noisy:
            self.noisy.append(number)
        return len(self.prompts) + self.noisy.index(number)

    def _assign_slots(self) -> None:
        self.branched = sorted((p for p in self.places if p.touched), key=lambda p: p.first)
        for slot, place in enumerate(self.branched, start=len(self.trunks)):
            place.slot = slot
        for place in self.places:
            if not place.touched:
                place.slot = place.trunk
        self.slot_trunks = [*range(len(self.trunks)), *(p.trunk for p in self.branched)]
        self.slot_prompts = [self.trunks[t].prompt for t in self.slot_trunks]


def _prefix_end(row: Row) -> int:
    """How far the prefix may reach for this row: to its first bound token or the first position read, and
    not into the answer, which other rows of the prompt may not share."""
    bound = [item.first_bound(row.prompt) for item in row.branch if item.layers and item.touched(row.prompt)]
    return min([*bound, *row.read_positions(), row.prompt.length])


def batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Consecutive rows that run together: prompts (donors too) and suffixes, padded to the longest of each,
    hold at most `batch_tokens` tokens. Rows of prompts that are in the batch already are held to that by
    their suffixes alone: however long a prompt is, its prefix is not computed anew for every few rows."""
    batch: list[Row] = []
    prompts: dict[int, int] = {}
    longest = 0
    for row in rows:
        new = {id(p): p.length for p in (row.prompt, *row.donors.values())}
        together = prompts | new
        suffix = max(longest, _suffix(row))
        suffixes = (len(batch) + 1) * suffix
        known = len(together) == len(prompts)
        held = suffixes if known else suffixes + len(together) * max(together.values())
        if batch and held > batch_tokens:
            yield batch
            batch, together, suffix = [], new, _suffix(row)
        batch.append(row)
        prompts, longest = together, suffix
    if batch:
        yield batch


def _suffix(row: Row) -> int:
    """Tokens of a row after its last image."""
    end = row.prompt.spans[-1][1] if row.prompt.spans else 0
    return row.prompt.length + len(row.answer) - end
