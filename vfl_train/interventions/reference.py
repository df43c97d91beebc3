"""The reference path: one full forward per row with explicit masks. Short and obviously right; every
decoder whose self-attention goes through transformers' attention interface.

How: while a batch runs, the decoder's attention function is replaced by `_reference_attention`, which has
query, key and value after RoPE and the full mask in hand. Donor prompts run as rows of the same batch, so
a swap reads their K and V where they are computed; nothing is stored. The state lives in a context
variable and one config attribute, both restored on any exit.

What is not covered: cross-attention to the image (mllama), attention with soft-capping or sinks; such
models are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from vfl_train.errors import ConfigError
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
from vfl_train.models.batching import stack
from vfl_train.models.generation import check_finite

NAME = "vfl_reference"


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
    again: dict[tuple[int, str], list[int]] = field(default_factory=dict)


_PLAN: ContextVar[Plan | None] = ContextVar("vfl_reference_plan", default=None)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float | None):
    """[B, H, T, D] under an additive bias [B, 1, T, T]; grouped K and V are repeated."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def noise_like(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Gaussian noise with the norm that each token and head of `x` [H, S, D] has."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, generator=generator).to(x)
    return noise * (x.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True).clamp_min(1e-6))


def check_attention(module: torch.nn.Module, kwargs: dict) -> str | None:
    """Why an attention with these arguments has no path here, or None."""
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        return f"{type(module).__name__} uses soft-capping or sinks, which no path computes"
    return None


def _reference_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention function: plain attention, then once more for the rows that the plan edits here."""
    plan = _PLAN.get()
    if plan is None or attention_mask is None:
        raise ConfigError(f"{type(module).__name__} passes no attention mask: no reference path for it")
    if (reason := check_attention(module, kwargs)) is not None:
        raise ConfigError(reason)
    if module.layer_idx in plan.uniform:
        query = query.clone()
        query[plan.uniform[module.layer_idx]] = 0  # equal scores: equal weights
    out = _attend(query, key, value, attention_mask, scaling)
    edits = plan.edits.get(module.layer_idx)
    if edits:
        rows = torch.tensor([e.row for e in edits], device=query.device)
        k, v, bias = key[rows], value[rows], attention_mask.expand(query.shape[0], -1, -1, -1)[rows].clone()
        for i, edit in enumerate(edits):
            for (start, stop), donor, (from_start, from_stop) in edit.swapped:
                if donor is None:
                    k[i, :, start:stop] = noise_like(k[i, :, start:stop], start)
                    v[i, :, start:stop] = noise_like(v[i, :, start:stop], stop)
                else:
                    k[i, :, start:stop] = key[donor, :, from_start:from_stop]
                    v[i, :, start:stop] = value[donor, :, from_start:from_stop]
            for start, stop in edit.dropped:
                bias[i, 0, :, start:stop] = torch.finfo(bias.dtype).min
        bound = torch.stack([e.bound for e in edits])[:, None, :, None]
        out[rows] = torch.where(bound, _attend(query[rows], k, v, bias, scaling), out[rows])
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _reference_attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def _installed(vlm: VisionLanguageModel, plan: Plan) -> Iterator[None]:
    """`plan` in force for the forwards inside; the model is untouched again afterwards."""
    with ExitStack() as stack:
        stack.callback(_PLAN.reset, _PLAN.set(plan))
        stack.enter_context(attention_named(vlm.text_config, NAME))
        for (layer, name), rows in plan.silenced.items():
            module = getattr(vlm.layers[layer], name)
            stack.callback(module.register_forward_hook(silence(rows)).remove)
        run_again(vlm, plan.again, stack)
        yield


# --- batches -----------------------------------------------------------------------------------


def check_row(vlm: VisionLanguageModel, row: Row) -> None:
    """Raises ConfigError for layers and images that do not exist and for swaps of unequal grids."""
    check_branch(row.branch)
    for item in row.branch:
        item.check(vlm.num_layers)
        for layer in item.layers:
            vlm.attention(layer)
        for span in item.spans or ():
            if not 0 <= span < len(row.prompt.spans):
                raise ConfigError(f"image {span} is not in this prompt of {len(row.prompt.spans)}")
        if item.donor not in (None, NOISE):
            donor = row.donors[item.donor]
            if donor.grids != row.prompt.grids:
                raise ConfigError(
                    f"swap refused: grids differ ({row.prompt.grids} and {donor.grids})",
                    "use images of equal size",
                )


def _batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[tuple[list[Row], list[Prompt]]]:
    """Consecutive rows and the donors they need, at most `batch_tokens` padded tokens a batch."""
    batch: list[Row] = []
    donors: dict[int, Prompt] = {}
    longest = 0
    for row in rows:
        new = {id(p): p for p in row.donors.values()}
        length = max(longest, row.prompt.length + len(row.answer), *(p.length for p in new.values()), 0)
        if batch and length * (len(batch) + 1 + len(donors | new)) > batch_tokens:
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
    touched = range(len(row.prompt.spans)) if item.spans is None else sorted(item.spans)
    if item.kind in WHOLE_SEQUENCE:
        for layer in item.layers:
            if item.kind == "uniform":
                plan.uniform.setdefault(layer, []).append(index)
            elif item.kind == "rerun":
                plan.again.setdefault((layer, item.at), []).append(index)
            else:
                for name in silenced_modules(vlm, item.module):
                    plan.silenced.setdefault((layer, name), []).append(index)
        return
    if not touched:
        return  # nothing to read in a text-only prompt
    position = torch.arange(width)
    bound = position >= row.prompt.spans[min(touched)][1]
    if item.phase == "decode":
        bound &= position >= row.prompt.length - 1
    for start, stop in row.prompt.spans:
        bound &= (position < start) | (position >= stop)
    for layer in item.layers:
        edit = Edit(index, bound)
        for s in touched:
            if item.kind == "drop":
                edit.dropped.append(row.prompt.spans[s])
            else:
                donor = None if item.donor == NOISE else row.donors[str(item.donor)]
                source = row.prompt.spans[s] if donor is None else donor.spans[s]
                edit.swapped.append(
                    (row.prompt.spans[s], None if donor is None else donor_rows[id(donor)], source)
                )
        plan.edits.setdefault(layer, []).append(edit)


def _plan(vlm: VisionLanguageModel, batch: list[Row], donors: list[Prompt], width: int) -> Plan:
    donor_rows = {id(p): len(batch) + i for i, p in enumerate(donors)}
    plan = Plan()
    for index, row in enumerate(batch):
        for item in row.branch:
            _add_edits(vlm, plan, index, row, item, donor_rows, width)
    for edits in plan.edits.values():
        edits[:] = _merge(edits)
        for edit in edits:
            edit.bound = edit.bound.to(vlm.device)
    return plan


def _merge(edits: list[Edit]) -> list[Edit]:
    """One edit a row: a branch may touch different spans of a row at one layer, with equal bounds only."""
    merged: dict[int, Edit] = {}
    for edit in edits:
        first = merged.setdefault(edit.row, edit)
        if first is not edit:
            if not torch.equal(first.bound, edit.bound):
                raise ConfigError(DIFFERENT_BOUNDS)
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
    for batch, donors in _batches(rows, batch_tokens):
        inputs = stack(vlm, [(r.prompt, r.answer) for r in batch] + [(p, ()) for p in donors])
        plan = _plan(vlm, batch, donors, inputs["input_ids"].shape[1])
        wanted = sorted({position for r in batch for position in r.read_positions()})
        keep = torch.tensor(wanted, device=vlm.device)
        with _installed(vlm, plan):
            logits = vlm.model(**inputs, use_cache=False, logits_to_keep=keep).logits
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
        scores = row_logits[list(at)].float()
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
