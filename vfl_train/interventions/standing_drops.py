"""Drops that stay on during plain forwards and `generate` with a KV cache (see `standing`).

The attention of the dropped layers hides the images' keys from the bound queries, by their positions in the
prompt and its answer; every other layer's is scaled dot product attention as ever. Nothing is left out of the
cache: where images are dropped from a layer to the last, `drop_plan` saves what this does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vfl_train.errors import ConfigError
from vfl_train.interventions.hooks import attention_named
from vfl_train.interventions.intervention import Intervention
from vfl_train.interventions.readout import Prompt
from vfl_train.interventions.reference import check_attention, whole_mask

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel

NAME = "vfl_standing"


@dataclass
class _Drops:
    """`seen`: tokens that each layer has seen of the sequence at hand."""

    items: Sequence[Intervention]
    prompts: Sequence[Prompt]
    seen: dict[int, int] = field(default_factory=dict)

    def hidden(self, layer: int, query: torch.Tensor, key: torch.Tensor, window: bool) -> torch.Tensor:
        """bool [B, 1, S, T]: which keys of a dropped layer its queries must not see. Keys end where queries
        do, and begin later than the sequence where a window has forgotten some. Raises ConfigError."""
        new, kept = query.shape[2], key.shape[2]
        seen = new if kept == new else self.seen.get(layer, 0) + new  # nothing kept: a sequence begins
        self.seen[layer] = seen
        if len(query) != len(self.prompts):
            raise ConfigError(f"{len(query)} rows run under drops that stand for {len(self.prompts)} prompts")
        if kept > seen or (kept < seen and not window):
            raise ConfigError("a drop cannot stand on this cache", "use generate's default cache, greedily")
        out = torch.zeros(len(query), 1, new, kept, dtype=torch.bool, device=query.device)
        at = torch.arange(seen, device=query.device)
        queries, keys = at[seen - new :], at[seen - kept :]
        for row, prompt in enumerate(self.prompts):
            for item in self.items:
                if layer not in item.layers or not item.touched(prompt):
                    continue
                bound = queries >= item.first_bound(prompt)
                for start, stop in prompt.spans:
                    bound &= (queries < start) | (queries >= stop)
                for start, stop in (prompt.spans[s] for s in item.touched(prompt)):
                    out[row, 0] |= bound[:, None] & (keys >= start) & (keys < stop)
        return out


_DROPS: ContextVar[_Drops | None] = ContextVar("vfl_standing_drops", default=None)


def _attention(module: torch.nn.Module, query, key, value, attention_mask, **kwargs):
    """Attention function: SDPA, with the keys hidden that the drops name."""
    drops = _DROPS.get()
    if drops is None or attention_mask is None:
        raise ConfigError(f"{type(module).__name__} passes no attention mask: a drop cannot stand on it")
    if (reason := check_attention(module, kwargs)) is not None:
        raise ConfigError(reason)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if any(layer in item.layers for item in drops.items):
        window = getattr(module, "sliding_window", None) is not None
        attention_mask = attention_mask & ~drops.hidden(layer, query, key, window)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, whole_mask)


@contextmanager
def drops_standing(
    vlm: VisionLanguageModel, items: Sequence[Intervention], prompts: Sequence[Prompt]
) -> Iterator[None]:
    """Drops in force for the forwards inside, whose batch is `prompts` in order, unpadded and of one length.
    Raises ConfigError for an image that is not there, prompts of unequal length and models that read images
    by cross-attention, and while it runs for batches of another size and caches that are no DynamicCache."""
    if vlm.family.cross_attention is not None:
        fix = "use generation.generate_under, which needs no cache"
        raise ConfigError(
            f"a drop cannot stand on {vlm.model_type}, which reads images by cross-attention", fix
        )
    if len({prompt.length for prompt in prompts}) != 1:
        raise ConfigError("drops stand for prompts of one length", "run the others apart from them")
    for item in items:
        for prompt in prompts:
            for span in item.touched(prompt):
                if not 0 <= span < len(prompt.spans):
                    raise ConfigError(f"image {span} is not in this prompt of {len(prompt.spans)}")
    token = _DROPS.set(_Drops(items, prompts))
    try:
        with attention_named(vlm.text_config, NAME):
            yield
    finally:
        _DROPS.reset(token)
