"""What decoder layers are given beside hidden states (position embeddings, position ids, masks), cut to the
tokens that the engine runs them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vfl_train.interventions.layout import Layout

# Axis of the tokens, from the end; the batch axis stands before it.
TOKEN_AXIS = {"position_embeddings": -2, "position_ids": -1}


class NotExact(Exception):
    """The engine would not give this model's numbers; the text says why."""


class TokenTensors:
    """Cuts the arguments of decoder layers for a layout. Tensors that every layer gets are cut once."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.prefix = max(layout.prefix)
        self.suffix = max(map(layout.tokens, layout.trunks))
        self.starts = torch.tensor(layout.prefix, device=device)
        self.lengths = torch.tensor(
            [p.length + len(layout.longest_context(n)) for n, p in enumerate(layout.prompts)], device=device
        )
        self.prompts = torch.tensor(layout.slot_prompts, device=device)[:, None]
        positions = self.starts[self.prompts] + torch.arange(self.suffix, device=device)
        self.positions = positions.clamp(max=int(self.lengths.max()) - 1)  # [slots, suffix]
        self.checked: dict[int, torch.Tensor] = {}
        self.gathered: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of_prefixes(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """For all prefixes at once. Raises NotExact for a mask under which a prefix depends on what follows,
        or what follows is not plain causal."""
        mask = kwargs.get("attention_mask")
        if mask is not None and id(mask) not in self.checked:
            self._check_mask(mask)
            self.checked[id(mask)] = mask
        cut = map_token_tensors(kwargs, lambda t, axis: t.narrow(axis, 0, self.prefix))
        return {**cut, "attention_mask": None if mask is None else mask[..., : self.prefix, : self.prefix]}

    def of_suffixes(self, kwargs: dict[str, Any], slots: int) -> dict[str, Any]:
        """For the suffixes of the first `slots` slots."""

        def gather(t: torch.Tensor, axis: int) -> torch.Tensor:
            if id(t) not in self.gathered:
                prompts = self.prompts if t.shape[axis - 1] > 1 else torch.zeros_like(self.prompts)
                self.gathered[id(t)] = t, _take(t, axis, prompts, self.positions)
            return self.gathered[id(t)][1].narrow(axis - 1, 0, slots)

        return {**map_token_tensors(kwargs, gather), "attention_mask": None}

    def at_positions(self, kwargs: dict[str, Any], slots: torch.Tensor, at: torch.Tensor) -> dict[str, Any]:
        """Of what `of_suffixes` gave: slots [n, 1], suffix positions [n, m]."""
        return map_token_tensors(kwargs, lambda t, axis: _take(t, axis, slots, at))

    def _check_mask(self, mask: torch.Tensor) -> None:
        """mask [prompts or 1, 1, T, T], bool (True: seen) or additive."""
        seen = mask if mask.dtype == torch.bool else mask == 0
        at = torch.arange(mask.shape[-1], device=mask.device)
        query, key = at[:, None], at[None, :]
        start, length = (t[:, None, None, None] for t in (self.starts, self.lengths))
        real = (query < length) & (key < length)
        leaks = seen & (query < start) & (key >= start)
        differs = (query >= start) & (seen != (key <= query))
        if bool((leaks & real).any()):
            raise NotExact("the image sees the text after it (a bidirectional prefix?)")
        if bool((differs & real).any()):
            raise NotExact("text does not see all before it (a sliding window shorter than the prompt?)")


def map_token_tensors(
    kwargs: dict[str, Any], cut: Callable[[torch.Tensor, int], torch.Tensor]
) -> dict[str, Any]:
    """`cut` applied to every tensor with a token axis. Raises NotExact for tensors nobody knows of."""
    if kwargs.get("shared_kv_states"):
        raise NotExact("decoder layers read keys and values of earlier ones")
    out = {}
    for name, value in kwargs.items():
        if name in TOKEN_AXIS and value is not None:
            axis = TOKEN_AXIS[name]
            out[name] = (
                cut(value, axis) if isinstance(value, torch.Tensor) else tuple(cut(t, axis) for t in value)
            )
        elif name == "attention_mask" or not isinstance(value, torch.Tensor):
            out[name] = value
        else:
            raise NotExact(f"decoder layers take {name}, which the engine does not know")
    if out.get("past_key_values") is not None:
        raise NotExact("decoder layers keep a cache though none is asked for")
    return out


def _take(t: torch.Tensor, axis: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """t [..., B, T, (D)] at rows [n, 1] of B and columns [n, m] of T: [..., n, m, (D)]."""
    return t[..., rows, columns, :] if axis == -2 else t[..., rows, columns]
