"""The reference path: one full forward per row with explicit masks. Short and obviously right; every
decoder whose self-attention goes through transformers' attention interface.

How: while a batch runs, the decoder's attention function is replaced by `_reference_attention`, which has
query, key and value after RoPE and the full mask in hand. Donor prompts run as rows of the same batch, so
a swap reads their K and V where they are computed; nothing is stored. The state lives in a context
variable and one config attribute, both restored on any exit.

Memory beside the activations: of B sequences of T tokens (donors too) the mask, B T^2 bytes, and about as
much twice over while transformers makes it; where the model has two kinds of mask (sliding layers), of both.
What is widened to floats is bounded (`PAIRS_AT_A_TIME`). A drop in a prompt of 10,000 tokens takes 0.25 GB,
a swap with its donor and two kinds of mask 0.7 GB (measured on tiny models). `batch_tokens` bounds B T, but
one row and its donors always run.

What is not covered: attention with sinks; such models are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from vfl_train.errors import ConfigError
from vfl_train.interventions.cross_attention import Blind, blinded, image_keys, skip_mlp
from vfl_train.interventions.hooks import attention_named, run_again, silence, silenced_modules
from vfl_train.interventions.intervention import (
    DIFFERENT_BOUNDS,
    NOISE,
    WHOLE_SEQUENCE,
    Intervention,
    check_branch,
)
from vfl_train.interventions.readout import Cost, Prompt, ReadOut, Row
from vfl_train.models import VisionLanguageModel
from vfl_train.models.batching import alike, stack
from vfl_train.models.generation import check_finite

NAME = "vfl_reference"
# Pairs of query and key whose mask is widened to a bias at a time: 64 MB in float32. A sequence's whole mask
# is kept as one byte a pair, 100 MB at 10,000 tokens.
PAIRS_AT_A_TIME = 2**24


@dataclass
class Edit:
    """What one batch row sees changed at one layer. `bound`: bool [T], the queries that see it."""

    row: int
    bound: torch.Tensor
    dropped: list[tuple[int, int]] = field(default_factory=list)
    swapped: list[tuple[tuple[int, int], int | None, tuple[int, int]]] = field(default_factory=list)


@dataclass
class Plan:
    """The edits of a batch: per layer for attention, per layer and module for knockouts, per layer for
    uniform attention and, with the time, for layers that run again (row indices)."""

    edits: dict[int, list[Edit]] = field(default_factory=dict)
    silenced: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    uniform: dict[int, list[int]] = field(default_factory=dict)
    blind: Blind = field(default_factory=dict)
    again: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    attended: set[int] = field(default_factory=set)  # layers whose attention ran

    def check_attended(self) -> None:
        """Raises ConfigError for edits that no attention has seen: they would seem to have no effect."""
        # A cross-attention layer does not run where there is no image.
        if missed := {*self.edits, *self.uniform} - self.attended - {*self.blind}:
            raise ConfigError(
                f"the attention of layer {min(missed)} does not go through transformers' attention interface",
                "interventions need a model whose does",
            )


_PLAN: ContextVar[Plan | None] = ContextVar("vfl_reference_plan", default=None)


def _attend(q, k, v, mask: torch.Tensor, scale: float | None, softcap: float | None) -> torch.Tensor:
    """[B, H, S, D] under a mask [B, 1, S, T], bool (True: seen) or additive; grouped K and V are repeated.
    `softcap`: scores are bent to stay below it (Gemma 2)."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) / softcap).tanh() * softcap
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    wide = torch.promote_types(torch.float32, q.dtype)
    return scores.softmax(-1, dtype=wide).to(q.dtype) @ v


def noise_like(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Gaussian noise with the norm that each token and head of `x` [H, S, D] has."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, generator=generator).to(x)
    return noise * (x.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True).clamp_min(1e-6))


def check_attention(module: torch.nn.Module, kwargs: dict) -> str | None:
    """Why only the reference path computes an attention with these arguments, or None. Raises ConfigError
    where it does not either."""
    for key, what in (("s_aux", "sinks"), ("position_bias", "a bias for positions")):
        if kwargs.get(key) is not None:
            raise ConfigError(f"{type(module).__name__} uses {what}, which no path computes")
    return f"{type(module).__name__} uses soft-capping" if kwargs.get("softcap") is not None else None


def _reference_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention function: plain attention, then once more for the rows that the plan edits here."""
    plan = _PLAN.get()
    if plan is None or attention_mask is None:
        raise ConfigError(f"{type(module).__name__} passes no attention mask: no reference path for it")
    check_attention(module, kwargs)
    softcap = kwargs.get("softcap")
    plan.attended.add(module.layer_idx)
    if module.layer_idx in plan.uniform:
        query = query.clone()
        query[plan.uniform[module.layer_idx]] = 0  # equal scores: equal weights
    edits = plan.edits.get(module.layer_idx, [])
    blind = plan.blind.get(module.layer_idx)
    if blind is not None:  # its mask may be of the vision tower's number format
        attention_mask = attention_mask == 0
    rows, k, v, hidden = _edited(edits, key, value)
    unseen = False if attention_mask.dtype == torch.bool else torch.finfo(attention_mask.dtype).min
    parts, step = [], max(1, PAIRS_AT_A_TIME // (key.shape[0] * key.shape[2]))
    for start in range(0, query.shape[2], step):
        q, mask = query[:, :, start : start + step], attention_mask[:, :, start : start + step]
        part = _attend(q, key, value, mask, scaling, softcap)
        if edits:
            mask = mask.expand(len(q), -1, -1, -1)[rows].masked_fill(hidden, unseen)
            bound = torch.stack([e.bound[start : start + step] for e in edits])[:, None, :, None]
            read = _attend(q[rows], k, v, mask, scaling, softcap)
            if blind is not None:
                read = blinded(read, bound, mask, blind)
            part[rows] = torch.where(bound, read, part[rows])
        parts.append(part)
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _edited(edits: Sequence[Edit], key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the bound queries of the edited rows read: (rows [E], K and V [E, Hkv, T, D], the keys that they
    do not see, bool [E, 1, 1, T])."""
    rows = torch.tensor([e.row for e in edits], dtype=torch.long, device=key.device)
    k, v = key[rows], value[rows]
    hidden = torch.zeros(len(edits), 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    for i, edit in enumerate(edits):
        for (start, stop), donor, (from_start, from_stop) in edit.swapped:
            if donor is None:
                k[i, :, start:stop] = noise_like(k[i, :, start:stop], start)
                v[i, :, start:stop] = noise_like(v[i, :, start:stop], stop)
            else:
                k[i, :, start:stop] = key[donor, :, from_start:from_stop]
                v[i, :, start:stop] = value[donor, :, from_start:from_stop]
        for start, stop in edit.dropped:
            hidden[i, :, :, start:stop] = True
    return rows, k, v, hidden


def whole_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Which keys a query sees, bool [B, 1, T, T], also where attention is plainly causal."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, _reference_attention)
AttentionMaskInterface.register(NAME, whole_mask)


@contextmanager
def _installed(vlm: VisionLanguageModel, plan: Plan) -> Iterator[None]:
    """`plan` in force for the forwards inside; the model is untouched again afterwards."""
    with ExitStack() as stack:
        stack.callback(_PLAN.reset, _PLAN.set(plan))
        stack.enter_context(attention_named(vlm.text_config, NAME))
        skip_mlp(vlm, plan.blind, {k: [e.row for e in edits] for k, edits in plan.edits.items()}, stack)
        for (layer, name), rows in plan.silenced.items():
            module = getattr(vlm.layers[layer], name)
            stack.callback(module.register_forward_hook(silence(rows)).remove)
        run_again(vlm, plan.again, stack)
        yield


# --- batches -----------------------------------------------------------------------------------


def check_row(vlm: VisionLanguageModel, row: Row) -> None:
    """Raises ConfigError for layers and images that do not exist, for swaps of unequal grids, and for a layer
    at which a branch binds different queries."""
    check_branch(row.branch)
    bounds: dict[int, int] = {}
    for item in row.branch:
        item.check(vlm.num_layers)
        for layer in item.layers:
            vlm.attention(layer)
        for span in item.spans or ():
            if not 0 <= span < len(row.prompt.spans):
                raise ConfigError(f"image {span} is not in this prompt of {len(row.prompt.spans)}")
        if item.kind not in WHOLE_SEQUENCE and item.touched(row.prompt):
            first = item.first_bound(row.prompt)
            if any(bounds.setdefault(layer, first) != first for layer in item.layers):
                raise ConfigError(DIFFERENT_BOUNDS)
        if item.donor not in (None, NOISE):
            donor = row.donors[item.donor]
            if donor.grids != row.prompt.grids:
                raise ConfigError(
                    f"swap refused: grids differ ({row.prompt.grids} and {donor.grids})",
                    "use images of equal size",
                )


def _batches(
    vlm: VisionLanguageModel, rows: Sequence[Row], batch_tokens: int
) -> Iterator[tuple[list[Row], list[Prompt]]]:
    """Consecutive rows, alike, and the donors they need, at most `batch_tokens` padded tokens a batch."""
    batch: list[Row] = []
    donors: dict[int, Prompt] = {}
    longest = 0
    for row in rows:
        new = {id(p): p for p in row.donors.values()}
        length = max(longest, row.prompt.length + len(row.answer), *(p.length for p in new.values()), 0)
        full = length * (len(batch) + 1 + len(donors | new)) > batch_tokens
        if batch and (full or alike(vlm, batch[0].prompt) != alike(vlm, row.prompt)):
            yield batch, list(donors.values())
            batch, donors = [], {}
            length = max(row.prompt.length + len(row.answer), *(p.length for p in new.values()), 0)
        batch.append(row)
        donors |= new
        longest = length
    if batch:
        yield batch, list(donors.values())


def _add_edits(
    vlm: VisionLanguageModel,
    plan: Plan,
    index: int,
    row: Row,
    item: Intervention,
    donor_rows: dict[int, int],
    width: int,
) -> None:
    """Enter one intervention of the batch row `index` into the plan."""
    touched = item.touched(row.prompt)
    if item.kind in WHOLE_SEQUENCE:
        for layer in item.layers:
            if item.kind == "uniform":
                plan.uniform.setdefault(layer, []).append(index)
            elif item.kind == "rerun":
                plan.again.setdefault((layer, item.at), []).append(index)
            else:
                for name in silenced_modules(vlm, layer, item.module):
                    plan.silenced.setdefault((layer, name), []).append(index)
        return
    if not touched:
        return  # nothing to read in a text-only prompt
    position = torch.arange(width)
    bound = position >= item.first_bound(row.prompt)
    for start, stop in row.prompt.spans:
        bound &= (position < start) | (position >= stop)
    for layer in item.layers:
        edit = Edit(index, bound)
        for s in touched:
            keys = image_keys(vlm, layer, row.prompt, s)
            if item.kind == "drop":
                edit.dropped.append(keys)
            else:
                donor = None if item.donor == NOISE else row.donors[str(item.donor)]
                source = keys if donor is None else image_keys(vlm, layer, donor, s)
                edit.swapped.append((keys, None if donor is None else donor_rows[id(donor)], source))
        plan.edits.setdefault(layer, []).append(edit)


def _plan(vlm: VisionLanguageModel, batch: list[Row], donors: list[Prompt], width: int) -> Plan:
    donor_rows = {id(p): len(batch) + i for i, p in enumerate(donors)}
    plan = Plan(blind={layer: [] for layer in range(vlm.num_layers) if vlm.reads_across(layer)})
    for index, row in enumerate(batch):
        for item in row.branch:
            _add_edits(vlm, plan, index, row, item, donor_rows, width)
    for edits in plan.edits.values():
        edits[:] = _merge(edits)
        for edit in edits:
            edit.bound = edit.bound.to(vlm.device)
    return plan


def _merge(edits: list[Edit]) -> list[Edit]:
    """One edit a row: a branch may touch different spans of a row at one layer (`check_row`: bound alike)."""
    merged: dict[int, Edit] = {}
    for edit in edits:
        first = merged.setdefault(edit.row, edit)
        if first is not edit:
            first.dropped += edit.dropped
            first.swapped += edit.swapped
    return list(merged.values())


@torch.no_grad()
def read_out_reference(
    vlm: VisionLanguageModel, rows: Sequence[Row], batch_tokens: int = 8192, cost: Cost | None = None
) -> Iterator[ReadOut]:
    """Read-outs of `rows` in order; see `readout.read_out`. Raises ConfigError for layers or images that
    do not exist and for swaps between unequal grids."""
    for row in rows:
        check_row(vlm, row)
    for batch, donors in _batches(vlm, rows, batch_tokens):
        inputs = stack(vlm, [(r.prompt, r.answer) for r in batch] + [(p, ()) for p in donors])
        plan = _plan(vlm, batch, donors, inputs["input_ids"].shape[1])
        wanted = sorted({position for r in batch for position in r.read_positions()})
        keep = torch.tensor(wanted, device=vlm.device)
        with _installed(vlm, plan):
            logits = vlm.model(**inputs, use_cache=False, logits_to_keep=keep).logits
        plan.check_attended()
        if logits.shape[1] != len(wanted):  # some models make all logits, whatever is asked for
            logits = logits[:, keep]
        if cost is not None:
            tokens = inputs["input_ids"].numel()
            cost.rows += len(batch)
            cost.token_layers += tokens * (vlm.num_layers - 1 + len(plan.again))
            cost.last_layer_tokens += tokens
            cost.head_tokens += len(wanted) * len(logits)
        column = {position: i for i, position in enumerate(wanted)}
        columns = [[column[p] for p in row.read_positions()] for row in batch]
        yield from read_logits(logits, columns, batch)


def read_logits(
    logits: Iterable[torch.Tensor], columns: Sequence[Sequence[int]], rows: Sequence[Row]
) -> Iterator[ReadOut]:
    """Read-outs from each row's logits [positions, V]; `columns`: where its read positions stand. Raises
    NumericError."""
    for row_logits, at, row in zip(logits, columns, rows, strict=False):
        scores = row_logits[list(at)].to(torch.promote_types(row_logits.dtype, torch.float32))
        best, argmax = scores.max(-1)
        check_finite(best)
        predicted = argmax.tolist()
        tokens = row.target_tokens()
        if not tokens:
            yield ReadOut((), (), (), predicted[0])
            continue
        index = torch.tensor(tokens, device=scores.device)[:, None]
        logprobs = scores.log_softmax(-1).gather(1, index)[:, 0].tolist()
        greedy = tuple(p == t for p, t in zip(predicted, tokens, strict=True))
        yield ReadOut(tuple(logprobs), tuple(predicted), greedy)
