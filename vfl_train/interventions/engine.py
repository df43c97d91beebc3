"""The shared-prefix triangular engine: a sweep of branches at the price of little more than one forward.

The model's own forward runs once over the prompts of a batch, with its decoder layers' `forward` wrapped. At
each layer the wrapper
  1. runs the layer on the prefixes alone and keeps their K and V, of this one layer, where they are;
  2. lets the rows in whose branch first touches this layer, from their trunk's hidden state;
  3. runs the layer on all suffixes at once; their attention reads the shared prefixes by
     `vision_kv_attention`, span by span from where the row's branch says.
At the last layer only the positions that are read go through the MLP, and they are what the wrapper returns,
so that the model's own norm and head (and their scalings) make the logits. Embedding, merging of image
features, positions, masks, deep-stack additions: all the model's own, so no family is known here.

Branches that touch whole sequences (knockout, uniform, rerun) have no prefix to share: `tail` runs them.

Exact where a bound token cannot change the prefix, that is where no bound token precedes the last image and
attention is causal beyond it; other rows run on the reference path, counted in `Cost` with the reason.

The closest prior art, entering at a layer with a cached residual but without a shared prefix, was closed as a
negative result (RhizoNymph/vllm, pull request 218): only both together save what is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from vfl_train.interventions.hooks import attention_named, in_place_of, named
from vfl_train.interventions.layout import Layout, Place, Trunk, batches, why_not
from vfl_train.interventions.readout import Cost, ReadOut, Row
from vfl_train.interventions.reference import (
    check_attention,
    check_row,
    noise_like,
    read_logits,
    read_out_reference,
)
from vfl_train.interventions.tail import read_out_tail, whole_sequences
from vfl_train.interventions.tokens import NotExact, TokenTensors
from vfl_train.kernels import vision_kv_attention
from vfl_train.models.batching import stack

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel

NAME = "vfl_engine"
BACKEND: str | None = None  # of vision_kv_attention: the one switch; None takes the best there is


class _Captured(Exception):
    """Leaves a layer as soon as its attention has what was wanted."""


_SWEEP: ContextVar[_Sweep | None] = ContextVar("vfl_engine_sweep", default=None)


@torch.no_grad()
def read_out_engine(
    vlm: VisionLanguageModel, rows: Sequence[Row], batch_tokens: int, cost: Cost
) -> Iterator[ReadOut]:
    """Read-outs of `rows` in order; see `readout.read_out`, whose errors it raises."""
    for row in rows:
        check_row(vlm, row)
    tail = partial(read_out_tail, batch_tokens=batch_tokens)
    for batch in batches(rows, batch_tokens):
        whole = whole_sequences(batch)
        reasons = [_why_not(vlm, row, tails) for row, tails in zip(batch, whole, strict=True)]
        found: dict[bool, Iterator[ReadOut]] = {}
        for tails, run in ((False, _run), (True, tail)):
            ours = [row for row, t, r in zip(batch, whole, reasons, strict=True) if t == tails and r is None]
            try:
                found[tails] = iter(run(vlm, ours, cost=cost) if ours else ())
            except NotExact as e:
                reasons = [
                    str(e) if t == tails and r is None else r for t, r in zip(whole, reasons, strict=True)
                ]
        theirs = [row for row, reason in zip(batch, reasons, strict=True) if reason is not None]
        cost.reference_rows += len(theirs)
        cost.reasons.update(reason for reason in reasons if reason is not None)
        by_reference = read_out_reference(vlm, theirs, batch_tokens, cost)
        for tails, reason in zip(whole, reasons, strict=True):
            yield next(found[tails] if reason is None else by_reference)


def _why_not(vlm: VisionLanguageModel, row: Row, tails: bool) -> str | None:
    """Why the engine cannot run a row of this model exactly, as far as can be told beforehand. `tails`: it is
    for the tail, which shares what lies below a layer and needs layers that always run."""
    if vlm.family.cross_attention is not None or (row.prompt.spans and not tails):
        return vlm.family.reference_only or why_not(row)
    return None if tails else why_not(row)


def _run(vlm: VisionLanguageModel, rows: Sequence[Row], cost: Cost) -> Iterator[ReadOut]:
    """One batch. Raises NotExact; what was computed until then is in `cost`, the rows are not."""
    layout = Layout(rows)
    inputs = stack(vlm, [(p, layout.longest_context(n)) for n, p in enumerate(layout.prompts)])
    # Padding stands on the right, where a causal mask hides it; a mask that says so again would only keep
    # the fast kernels away.
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    sweep = _Sweep(vlm, layout, cost)
    with _installed(vlm, sweep):
        logits = vlm.model(**inputs, use_cache=False).logits
    cost.rows += len(rows)
    cost.head_tokens += logits.shape[0] * logits.shape[1]
    slots = [sweep.readers.index(place.slot) for place in layout.places]
    columns = [sweep.columns_of(place) for place in layout.places]
    return read_logits([logits[s] for s in slots], columns, rows)


@contextmanager
def _installed(vlm: VisionLanguageModel, sweep: _Sweep) -> Iterator[None]:
    """`sweep` in charge of the decoder layers inside; the model is untouched again afterwards."""
    with ExitStack() as undo:
        undo.callback(_SWEEP.reset, _SWEEP.set(sweep))
        undo.enter_context(attention_named(vlm.text_config, NAME))
        for index, layer in enumerate(vlm.layers):
            undo.enter_context(in_place_of(layer, partial(sweep.layer, index, layer.forward)))
        yield


def _engine_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention function: what the sweep wants of the layer at hand."""
    sweep = _SWEEP.get()
    if sweep is None:
        raise RuntimeError("the engine's attention outside of a sweep")
    if (reason := check_attention(module, kwargs)) is not None:
        raise NotExact(reason)
    sweep.calls += 1
    return sweep.attention(query, key, value, attention_mask, scaling).transpose(1, 2), None


AttentionInterface.register(NAME, _engine_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class _Sweep:
    """One batch under way: the suffixes' hidden states and the prefix K and V of the current layer."""

    attention: Callable[..., torch.Tensor]
    hidden: torch.Tensor  # [slots in use, suffix, D]
    prefix_kv: tuple[torch.Tensor, torch.Tensor]  # each [prompts, Hkv, prefix, D]
    captured: torch.Tensor

    def __init__(self, vlm: VisionLanguageModel, layout: Layout, cost: Cost) -> None:
        self.vlm, self.layout, self.cost = vlm, layout, cost
        self.tokens = TokenTensors(layout, vlm.device)
        self.calls = self.index = 0
        wanted: list[set[int]] = [set() for _ in layout.slot_prompts]
        for place in layout.places:
            wanted[place.slot].update(layout.suffix_positions(place))
        self.readers = [slot for slot, positions in enumerate(wanted) if positions]
        self.reads = [sorted(wanted[slot]) for slot in self.readers]

    def columns_of(self, place: Place) -> list[int]:
        """Where a row's read positions stand among its slot's."""
        reads = self.reads[self.readers.index(place.slot)]
        return [reads.index(p) for p in self.layout.suffix_positions(place)]

    # --- one layer -------------------------------------------------------------------------------

    def layer(
        self, index: int, forward: Callable, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """What stands in for decoder layer `index`: hidden states [prompts, T, D] in and out, of which the
        prefixes are computed; the last one returns [readers, positions, D] instead."""
        self.index, prefix, kwargs = index, self.tokens.prefix, named(forward, args, kwargs)
        if index == 0:
            self.hidden = self._embed(hidden_states)
        last = index == self.vlm.num_layers - 1
        inside = self.tokens.of_prefixes(kwargs)
        mixed = self._call(
            forward, hidden_states[:, :prefix], inside, self._keep_and_leave if last else self._keep
        )
        slots = self._let_in()
        outside = self.tokens.of_suffixes(kwargs, slots)
        if last:
            return self._last(forward, outside)
        self.hidden = self._call(forward, self.hidden, outside, self._attend)
        self.cost.token_layers += len(hidden_states) * prefix + slots * self.tokens.suffix
        return pad(mixed, (0, 0, 0, hidden_states.shape[1] - prefix))

    def _last(self, forward: Callable, kwargs: dict[str, Any]) -> torch.Tensor:
        """The last layer: keys and values of every token, everything else for what is read alone."""
        self._call(forward, self.hidden, kwargs, self._attend_and_leave)
        slots = torch.tensor(self.readers, device=self.hidden.device)[:, None]
        at = torch.tensor(_rectangle(self.reads), device=self.hidden.device)
        self.captured = self.captured.transpose(1, 2)[slots, at].transpose(1, 2)  # [readers, H, positions, D]
        self.cost.last_layer_tokens += at.numel()
        read = self.tokens.at_positions(kwargs, slots, at)
        return self._call(forward, self.hidden[slots, at], read, lambda *_: self.captured)

    def _call(
        self, forward: Callable, hidden: torch.Tensor, kwargs: dict, attention: Callable
    ) -> torch.Tensor:
        """The layer on `hidden` with `attention` in place of its own. Returns `hidden` if attention left."""
        self.attention, self.calls = attention, 0
        try:
            out = forward(hidden, **kwargs)
        except _Captured:
            out = hidden
        finally:
            del self.attention  # a bound method: a cycle that would keep the batch's tensors alive
        if self.calls != 1:
            raise NotExact("a decoder layer without self-attention that transformers' interface dispatches")
        return out[0] if isinstance(out, tuple) else out

    def _embed(self, hidden: torch.Tensor) -> torch.Tensor:
        """[trunks, suffix, D]: the trunks' embeddings out of the prompts' [prompts, T, D]."""
        out = hidden.new_zeros(len(self.layout.trunks), self.tokens.suffix, hidden.shape[2])
        for i, trunk in enumerate(self.layout.trunks):
            start, end = self.layout.prefix[trunk.prompt], self.layout.prompts[trunk.prompt].length
            out[i, : end - start] = hidden[trunk.prompt, start:end]
            out[i, end - start : self.layout.tokens(trunk)] = self._embed_context(trunk, hidden, end)
        return out

    def _embed_context(self, trunk: Trunk, hidden: torch.Tensor, end: int) -> torch.Tensor:
        """[context, D]. The batch holds the longest context of each prompt; of others the tokens are looked
        up. Raises NotExact where a lookup is not all that the model does."""
        longest = self.layout.longest_context(trunk.prompt)
        embedded = hidden[trunk.prompt, end : end + len(longest)]
        if trunk.context != longest[: len(trunk.context)]:
            ids = torch.tensor([*longest, *trunk.context], device=hidden.device)
            looked_up = self.vlm.base.get_input_embeddings()(ids)
            if not torch.equal(looked_up[: len(longest)], embedded):
                raise NotExact("the model's text embeddings are not those of its embedding layer")
            embedded = looked_up[len(longest) :]
        return embedded[: len(trunk.context)]

    def _let_in(self) -> int:
        """Rows that leave their trunk at this layer start from its hidden state. Returns the slots in use."""
        slots = self.layout.active(self.index)
        trunks = self.layout.slot_trunks[len(self.hidden) : slots]
        if trunks:
            index = torch.tensor(trunks, device=self.hidden.device)
            self.hidden = torch.cat([self.hidden, self.hidden[index]])
        return slots

    # --- attention in its place --------------------------------------------------------------------

    def _keep(self, q, k, v, mask, scale) -> torch.Tensor:
        """Prefixes attend themselves; their K and V stay for the rows of this layer."""
        if k.shape[2] != q.shape[2]:
            raise NotExact("a decoder layer attends more than its own tokens")
        self.prefix_kv = k, v
        groups = q.shape[1] // k.shape[1]
        if mask is None and q.is_cuda:
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=groups > 1)
        k, v = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)

    def _keep_and_leave(self, q, k, v, mask, scale) -> torch.Tensor:
        self.prefix_kv = k, v
        raise _Captured

    def _attend(self, q, k, v, mask, scale) -> torch.Tensor:
        """All suffixes in use, each row from where its branch says."""
        layout, slots = self.layout, len(q)
        source, start = layout.sources(self.index, slots)
        prefix_k, prefix_v, spans = *self.prefix_kv, layout.spans
        if any(n >= len(layout.prompts) for each in source for n in each):
            prefix_k = torch.cat([prefix_k, self._noise(prefix_k, 0)])
            prefix_v = torch.cat([prefix_v, self._noise(prefix_v, 1)])
        out = vision_kv_attention(
            q, prefix_k, prefix_v, k, v, row_image=layout.slot_prompts[:slots], row_source=source,
            spans=spans[: len(prefix_k)], row_start=start,
            prefix_lengths=[layout.prefix[n] for n in layout.banks[: len(prefix_k)]],
            scale=scale, backend=BACKEND, validate=self.index == 0,
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out

    def _attend_and_leave(self, q, k, v, mask, scale) -> torch.Tensor:
        self.captured = self._attend(q, k, v, mask, scale)
        raise _Captured

    def _noise(self, t: torch.Tensor, end: int) -> torch.Tensor:
        """[noisy prompts, Hkv, prefix, D]: noise in the spans of `t`, seeded as on the reference path."""
        noisy = t[torch.tensor(self.layout.noisy, device=t.device)]
        for i, n in enumerate(self.layout.noisy):
            for span in self.layout.prompts[n].spans:
                inside = slice(*span)
                noisy[i, :, inside] = noise_like(noisy[i, :, inside], span[end])
        return noisy


def _rectangle(ragged: Sequence[Sequence[int]]) -> list[list[int]]:
    """Every list as long as the longest, padded with its first element."""
    most = max(map(len, ragged))
    return [[*each, *[each[0]] * (most - len(each))] for each in ragged]
