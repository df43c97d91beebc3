"""The KV cache of a layer that nobody reads images from: text tokens only.

To the model it looks as long as the whole sequence, so that positions and masks come out as if nothing had
been left out; whoever attends (`drop_plan`) picks the columns of a mask that are there.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vfl_train.errors import ConfigError


class TextOnlyLayer(DynamicLayer):
    """One layer's K and V [B, Hkv, columns, D] of the tokens that are kept.

    `columns`: int [B, columns], the position in the sequence of each key, -1 where a row of a batch has
    nothing to put (`ragged`: there are such). `tokens`: length of the sequence, images included. `window`:
    of a sliding layer, whose keys beyond it are forgotten, though `columns` keeps count of them.
    """

    is_croppable = False

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window, self.is_sliding = window, window is not None
        self._forget()

    def _forget(self) -> None:
        self.columns: torch.Tensor | None = None
        self.tokens, self.ragged, self.expected = 0, False, False

    def grow(self, columns: torch.Tensor, tokens: int, ragged: bool) -> None:
        """What the cache will hold after the next `update`."""
        self.columns, self.tokens, self.ragged, self.expected = columns, tokens, ragged, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DynamicLayer.update`. Raises ConfigError where no drop plan is in force."""
        if not self.expected:
            raise ConfigError("this cache was filled under a drop plan", "go on under the same plan")
        self.expected = False
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.window is not None:
            # A window is one of positions. After a key there stand no more keys than positions (each is a
            # token's, a filler one of another kind), so the last ones hold all that the next query can see.
            forgotten = max(0, keys.shape[2] - (self.window - 1))
            self.keys, self.values = keys[:, :, forgotten:], values[:, :, forgotten:]
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens of the sequence, images included."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of a mask over the whole sequence."""
        return self.tokens + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ConfigError: decoding that takes tokens back (assisted, prompt lookup) is not supported."""
        raise ConfigError("a drop plan cannot take tokens back", "generate without an assistant model")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows in another order (beam search)."""
        super().reorder_cache(beam_idx)
        self._pick(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        if self.columns is not None:
            self.columns = self.columns.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows `indices`."""
        super().batch_select_indices(indices)
        self._pick(indices)

    def _pick(self, rows: torch.Tensor) -> None:
        if self.columns is not None:
            self.columns = self.columns[rows.to(self.columns.device)]


def text_only(cache: object, index: int) -> TextOnlyLayer:
    """Layer `index` of `cache`, put there in place of an empty one. Raises ConfigError for a layer that is
    filled, and for caches of a kind that cannot be shortened."""
    if not isinstance(cache, DynamicCache) or cache.offloading:
        raise _unknown("an offloaded cache" if getattr(cache, "offloading", False) else type(cache).__name__)
    while len(cache.layers) <= index:  # a cache without a configuration adds layers as they come
        cache.layers.append(DynamicLayer())
    found = cache.layers[index]
    if isinstance(found, TextOnlyLayer):
        return found
    if type(found) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise _unknown(type(found).__name__)
    if found.get_seq_length():
        raise ConfigError("the cache was filled outside of this drop plan", "begin with an empty one")
    cache.layers[index] = layer = TextOnlyLayer(getattr(found, "sliding_window", None))
    return layer


def _unknown(kind: str) -> ConfigError:
    return ConfigError(f"a drop plan cannot shorten {kind}", "use a DynamicCache, generate's default")
