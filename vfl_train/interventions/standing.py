"""A branch that stays on: for plain forwards and `generate` inside a `with` block.

    with standing(vlm, knockout([17])):
        vlm.model.generate(**inputs)
    with standing(vlm, drop([17], "decode", from_step=3), [prompt]):
        vlm.model.generate(**prompt.inputs)

Works with a KV cache: a layer that runs again gets a slot of its own behind the layers', filled and read like
theirs. Without a cache, and token by token the same, there is `generation.generate_under`. Drops speak of
images at places in a prompt, so they are given the prompts that run. A swap cannot stand: it reads keys that
its donor computes in the same pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from vfl_train.errors import ConfigError
from vfl_train.interventions.hooks import Rows, run_again, silence, silenced_modules
from vfl_train.interventions.intervention import Branch, check_branch
from vfl_train.interventions.readout import Prompt
from vfl_train.interventions.standing_drops import drops_standing
from vfl_train.interventions.uniform_attention import uniform_attention

if TYPE_CHECKING:
    from vfl_train.models import VisionLanguageModel

EVERY = slice(None)  # row of the batch


@contextmanager
def standing(vlm: VisionLanguageModel, branch: Branch, prompts: Sequence[Prompt] = ()) -> Iterator[None]:
    """`branch` in force for every row that the model runs inside; the model is untouched again afterwards,
    also by an exception.

    Args:
        prompts: where the branch drops images: of each row of the batch, all of one length (see
            `standing_drops`).

    Raises ConfigError for swaps, drops without prompts or beside uniform attention, layers that do not exist,
    and, when it comes to running a layer again, a cache that has no room for it.
    """
    check_branch(branch)
    drops = [item for item in branch if item.kind == "drop"]
    uniform = {layer for item in branch if item.kind == "uniform" for layer in item.layers}
    for item in branch:
        item.check(vlm.num_layers)
        if item.kind == "swap" or (item.kind == "drop" and not prompts):
            raise ConfigError(
                f"a {item.kind} cannot stand", "give a drop its prompts; for a swap use read_out"
            )
    if drops and uniform:
        raise ConfigError("a drop cannot stand beside uniform attention", "use generation.generate_under")
    again: dict[tuple[int, str], Rows] = {
        (layer, item.at): EVERY for item in branch if item.kind == "rerun" for layer in item.layers
    }
    with ExitStack() as undo:
        for item in branch:
            for layer in item.layers if item.kind == "knockout" else ():
                for name in silenced_modules(vlm, layer, item.module):
                    module = getattr(vlm.layers[layer], name)
                    undo.callback(module.register_forward_hook(silence(EVERY)).remove)
        if drops:
            undo.enter_context(drops_standing(vlm, drops, prompts))
        if uniform:
            rows_at = {layer: EVERY for layer in uniform}
            undo.enter_context(uniform_attention(vlm, rows_at.get))
        slots = {layer: vlm.num_layers + i for i, layer in enumerate(sorted(layer for layer, _ in again))}

        def once_more(layer: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Any:
            attention: Any = vlm.attention(layer)
            if kwargs.get("past_key_values") is not None:
                _make_room(kwargs["past_key_values"], slots)
            own, attention.layer_idx = attention.layer_idx, slots[layer]
            try:
                return vlm.layers[layer].forward(hidden, **kwargs)
            finally:
                attention.layer_idx = own

        run_again(vlm, again, undo, once_more)
        yield


def _make_room(cache: Cache, slots: dict[int, int]) -> None:
    """Slots in `cache` for the layers that run again, each of its layer's kind. Raises ConfigError."""
    if cache.layer_class_to_replicate is not None:
        return  # grows by itself
    for layer, slot in sorted(slots.items()):
        if slot < len(cache.layers):
            continue
        like = cache.layers[layer]
        if type(like) is DynamicSlidingWindowLayer:
            cache.layers.append(DynamicSlidingWindowLayer(like.sliding_window))
        elif type(like) is DynamicLayer:
            cache.layers.append(DynamicLayer())
        else:
            fix = "use the default cache, or use_cache=False"
            raise ConfigError(f"a cache of {type(like).__name__} has no room for a layer run again", fix)
