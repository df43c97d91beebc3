"""Whole-sequence branches (knockout, uniform, rerun) that share what lies below their first touched layer.

These touch every token, so there is no prefix to share; but below its first touched layer a branch is the
base. One forward of the base runs with its decoder layers' `forward` wrapped: at each layer the rows of the
branches that begin there are appended to the batch from the base's hidden state. The model itself sees the
base rows only; the others are kept beside them, and at the last layer the positions that are read of all rows
are returned, so that the model's own norm and head make the logits.

Cost of L single-layer knockouts plus base, in layers of one sequence: L + L(L + 1)/2 instead of L(L + 1),
about half. A rerun after the last layer costs one layer. A base that nobody reads is dropped where the last
of its branches leaves it, so that a branch alone costs what a plain forward does.

Exact as the reference path is; where it cannot be, `NotExact` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vfl_train.interventions.hooks import hidden_of, in_place_of, named, silence, silenced_modules
from vfl_train.interventions.intervention import WHOLE_SEQUENCE, Branch
from vfl_train.interventions.readout import Cost, Prompt, ReadOut, Row
from vfl_train.interventions.reference import read_logits
from vfl_train.interventions.tokens import NotExact, map_token_tensors
from vfl_train.interventions.uniform_attention import uniform_attention
from vfl_train.models.batching import stack

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel

Key = tuple[int, tuple[int, ...]]
Entry = tuple[int, bool]  # (layer, whether after it): where a row leaves the base


def whole_sequences(rows: Sequence[Row]) -> list[bool]:
    """Which of `rows` belong here: those that touch whole sequences and nothing else, and untouched ones
    whose sequence runs anyway as such a row's base."""
    ours = [bool(row.branch) and all(i.kind in WHOLE_SEQUENCE for i in row.branch) for row in rows]
    bases = {_key(row) for row, our in zip(rows, ours, strict=True) if our}
    return [our or (not row.branch and _key(row) in bases) for row, our in zip(rows, ours, strict=True)]


@torch.no_grad()
def read_out_tail(
    vlm: VisionLanguageModel, rows: Sequence[Row], batch_tokens: int, cost: Cost
) -> list[ReadOut]:
    """Read-outs of base and whole-sequence rows, in order. At most `batch_tokens` padded tokens are alive at
    a time: more branches take several passes, each with its own base. Rows must have been checked
    (`reference.check_row`). Raises NotExact; `cost` is then as it was."""
    found: list[ReadOut] = []
    spent = Cost()
    for batch in _passes(rows, batch_tokens):
        found += _run(vlm, batch, spent)
    cost.add(spent)
    return found


def _context(row: Row) -> tuple[int, ...]:
    """The answer tokens that are fed: those before the last position read."""
    return row.answer[: max(0, max(row.read_positions()) + 1 - row.prompt.length)]


def _key(row: Row) -> Key:
    """What rows of one base have in common."""
    return id(row.prompt), _context(row)


def _passes(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Consecutive rows whose bases and branches fit into `batch_tokens` (at least one row)."""
    batch: list[Row] = []
    bases: set[Key] = set()
    branches = width = 0
    for row in rows:
        key, length = _key(row), row.prompt.length + len(_context(row))
        more = len(bases | {key}) + branches + bool(row.branch)
        if batch and more * max(width, length) > batch_tokens:
            yield batch
            batch, bases, branches, width = [], set(), 0, 0
        batch.append(row)
        bases.add(key)
        branches += bool(row.branch)
        width = max(width, length)
    if batch:
        yield batch


@dataclass
class _Pass:
    """Who is where in a batch: bases first, those that nobody reads by where their last branch leaves them,
    the others after them; then branches in the order in which they leave them."""

    rows: Sequence[Row]
    depth: int
    bases: list[tuple[Prompt, tuple[int, ...]]] = field(default_factory=list)
    base_of: list[int] = field(default_factory=list)  # of each slot
    slot_of: list[int] = field(default_factory=list)  # of each row
    entries: list[Entry] = field(default_factory=list)  # of each slot after the bases, ascending
    leaving: list[Entry] = field(default_factory=list)  # of each unread base: its last branch's, ascending

    def __post_init__(self) -> None:
        own = [self._entry(row.branch) for row in self.rows]
        prompts: dict[Key, tuple[Prompt, tuple[int, ...]]] = {}
        last: dict[Key, Entry] = {}
        for row, entry in zip(self.rows, own, strict=True):
            key = _key(row)
            prompts[key] = row.prompt, _context(row)
            last[key] = max(last.get(key, (0, False)), entry or (self.depth, False))  # read: never left
        numbers = {key: i for i, key in enumerate(sorted(prompts, key=last.__getitem__))}
        self.bases = [prompts[key] for key in numbers]
        self.leaving = [last[key] for key in numbers if last[key][0] < self.depth]
        base_of_row = [numbers[_key(row)] for row in self.rows]
        self.base_of = list(range(len(self.bases)))
        self.slot_of = list(base_of_row)
        entering = [(entry, i) for i, entry in enumerate(own) if entry]
        for entry, i in sorted(entering):
            self.slot_of[i] = len(self.base_of)
            self.base_of.append(base_of_row[i])
            self.entries.append(entry)

    def _entry(self, branch: Branch) -> Entry | None:
        """None: the branch touches nothing and is the base."""
        first: list[Entry] = []
        for item in branch:
            for layer in item.layers:
                at_end = item.kind == "rerun" and item.at == "end"
                first.append((self.depth - 1 if at_end else layer, item.kind == "rerun"))
        return min(first, default=None)

    def alive(self, entry: Entry) -> int:
        """Slots in use once the rows of `entry` are in."""
        return len(self.bases) + sum(e <= entry for e in self.entries)

    def done(self, entry: Entry) -> int:
        """How many slots, from the first on, nobody needs once the rows of `entry` are in."""
        return sum(e <= entry for e in self.leaving)

    def slots(self, kind: str, **settings: str) -> dict[int, list[int]]:
        """Layer -> slots that have an intervention of this kind and these settings there."""
        found: dict[int, list[int]] = {}
        for row, slot in zip(self.rows, self.slot_of, strict=True):
            for item in row.branch:
                if item.kind == kind and all(getattr(item, k) == v for k, v in settings.items()):
                    for layer in item.layers:
                        found.setdefault(layer, []).append(slot)
        return found


def _run(vlm: VisionLanguageModel, rows: Sequence[Row], cost: Cost) -> list[ReadOut]:
    plan = _Pass(rows, vlm.num_layers)
    inputs = stack(vlm, plan.bases)
    # As in the engine: padding stands on the right, where a causal mask hides it.
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    tail = _Tail(vlm, plan, cost)
    with tail.installed():
        logits = vlm.model(**inputs, use_cache=False).logits
    cost.rows += len(rows)
    cost.head_tokens += logits.shape[0] * logits.shape[1]
    reads = [logits[tail.readers.index(slot)] for slot in plan.slot_of]
    columns = [
        [tail.reads[tail.readers.index(slot)].index(p) for p in row.read_positions()]
        for row, slot in zip(rows, plan.slot_of, strict=True)
    ]
    return list(read_logits(reads, columns, rows))


class _Tail:
    """One pass under way."""

    def __init__(self, vlm: VisionLanguageModel, plan: _Pass, cost: Cost) -> None:
        self.vlm, self.plan, self.cost = vlm, plan, cost
        self.base_of = torch.tensor(plan.base_of, device=vlm.device)
        self.forwards: list[Callable] = []
        self.running_again = False
        self.done = 0  # slots before this one do not run any more
        self.uniform = plan.slots("uniform")
        self.itself, self.at_end = plan.slots("rerun", at="itself"), plan.slots("rerun", at="end")
        self.given: dict[int, dict[str, Any]] = {}  # arguments of the layers that run again at the end
        self.repeated: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        wanted: list[set[int]] = [set() for _ in plan.base_of]
        for row, slot in zip(plan.rows, plan.slot_of, strict=True):
            wanted[slot].update(row.read_positions())
        self.readers = [slot for slot, positions in enumerate(wanted) if positions]
        self.reads = [sorted(wanted[slot]) for slot in self.readers]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """In charge of the decoder layers inside; the model is untouched again afterwards."""
        with ExitStack() as undo:
            for index, layer in enumerate(self.vlm.layers):
                self.forwards.append(layer.forward)
                undo.enter_context(in_place_of(layer, partial(self.layer, index)))
            for module in ("attention", "mlp", "both"):
                for index, slots in self.plan.slots("knockout", module=module).items():
                    for name in silenced_modules(self.vlm, index, module):
                        hook = self._silencing(slots)
                        undo.callback(
                            getattr(self.vlm.layers[index], name).register_forward_hook(hook).remove
                        )
            if self.uniform:
                undo.enter_context(uniform_attention(self.vlm, self._uniform_at))
            yield

    def _silencing(self, slots: list[int]) -> Callable:
        """Slots that run again stand elsewhere in their batch, and nothing touches them there."""
        return lambda *args: None if self.running_again else silence(self._running(slots))(*args)

    def _uniform_at(self, layer: int) -> list[int] | None:
        slots = None if self.running_again else self.uniform.get(layer)
        return slots and self._running(slots)

    def _running(self, slots: list[int]) -> list[int]:
        """Where `slots` stand among those that run."""
        return [slot - self.done for slot in slots]

    # --- one layer -------------------------------------------------------------------------------

    def layer(self, index: int, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What stands in for decoder layer `index`: hidden states [bases, T, D] in and out; the last one
        returns [readers, positions, D] instead."""
        kwargs = named(self.forwards[index], args, kwargs)
        hidden = self._let_in(hidden_states, self._carried(index, hidden_states), (index, False))
        if index in self.at_end:
            self.given[index] = kwargs
        self.done = self.plan.done((index, False))
        run = slice(self.done, len(hidden))
        out = hidden_of(self.forwards[index](hidden[run], **self._of(kwargs, run)))
        tokens = out.shape[0] * out.shape[1]
        if self.done:  # what is left behind stands still
            out = torch.cat([hidden[: self.done], out])
        out = self._let_in(out[: len(self.plan.bases)], out[len(self.plan.bases) :], (index, True))
        self._again(index, out, self.itself.get(index), kwargs)
        if index == self.vlm.num_layers - 1:
            self.cost.last_layer_tokens += tokens
            return self._read(out)
        self.cost.token_layers += tokens
        self.returned, self.branches = out[: len(self.plan.bases)], out[len(self.plan.bases) :]
        return self.returned

    def _carried(self, index: int, received: torch.Tensor) -> torch.Tensor:
        """The branches' hidden states, with what the model added to the bases since the last layer."""
        if index == 0:
            return received[:0]
        if received is self.returned or not len(self.branches) or torch.equal(received, self.returned):
            return self.branches
        if not self.vlm.family.adds_between_layers:
            raise NotExact("the model changes hidden states between its decoder layers")
        added = received - self.returned
        bases = len(self.plan.bases)
        return self.branches + added[self.base_of[bases : bases + len(self.branches)]]

    def _let_in(self, bases: torch.Tensor, branches: torch.Tensor, entry: Entry) -> torch.Tensor:
        """[slots in use, T, D]: the rows that leave their base here start from its hidden state."""
        new = self.base_of[len(bases) + len(branches) : self.plan.alive(entry)]
        return torch.cat([bases, branches, bases[new]])

    def _again(self, layer: int, out: torch.Tensor, slots: list[int] | None, kwargs: dict[str, Any]) -> None:
        """Run `layer` once more on `slots` of `out`, in place."""
        if slots is None:
            return
        self.running_again = True
        try:
            index = torch.tensor(slots, device=out.device)
            out[index] = hidden_of(self.forwards[layer](out[index], **self._of(kwargs, index)))
        finally:
            self.running_again = False
        self.cost.token_layers += len(slots) * out.shape[1]

    def _read(self, out: torch.Tensor) -> torch.Tensor:
        """The positions that are read, after what runs again at the end: [readers, positions, D]."""
        for layer, slots in sorted(self.at_end.items()):
            self._again(layer, out, slots, self.given[layer])
        most = max(map(len, self.reads))
        at = torch.tensor([[*p, *[p[0]] * (most - len(p))] for p in self.reads], device=out.device)
        return out[torch.tensor(self.readers, device=out.device)[:, None], at]

    # --- arguments -------------------------------------------------------------------------------

    def _of(self, kwargs: dict[str, Any], slots: slice | torch.Tensor) -> dict[str, Any]:
        """The arguments of a layer for `slots`."""

        def cut(t: torch.Tensor, axis: int) -> torch.Tensor:
            if t.shape[axis] == 1:  # the same for all
                return t
            if id(t) not in self.repeated:  # layers share them
                self.repeated[id(t)] = t, t.index_select(axis, self.base_of)
            full = self.repeated[id(t)][1]
            if isinstance(slots, slice):
                return full.narrow(axis, slots.start, slots.stop - slots.start)
            return full.index_select(axis, slots)

        out = map_token_tensors(kwargs, lambda t, axis: cut(t, t.dim() + axis - 1))
        mask = out.get("attention_mask")
        return out if mask is None else {**out, "attention_mask": cut(mask, 0)}
