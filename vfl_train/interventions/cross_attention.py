"""Interventions where a decoder reads its images by cross-attention (Llama 3.2 Vision).

The images are no tokens of such a decoder: the queries of some layers read keys and values that are made of
the vision tower's output alone, and all other layers see text only. So
  - a prompt has an empty span for each image, at its beginning: there are no image queries, and all tokens
    are bound. A token before an image is so too, because in transformers it reads the image: where the mask
    leaves a token nothing to see, the mask is taken off (only the MLP is skipped), which Meta's own code
    does not do. Bound only after the image, text would go on reading it through those tokens.
  - a drop at a cross-attention layer hides the vision tokens of the image from bound queries, a swap puts the
    donor's keys and values in their place. At the other layers both do nothing: what text reads there are
    text tokens' keys, also those of tokens that have read the image.
  - a query that has nothing left to see is not changed by that layer, neither by its attention nor by its
    MLP, as transformers skips these layers for prompts without images. All images dropped at all layers, a
    prompt says what it says when the model is given no image.

Here is what the reference path needs for that. The engine does not run such models: prefix keys that all
suffixes share are not among the tokens' keys.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfl_train.interventions.readout import Prompt
    from vfl_train.models import VisionLanguageModel

# Of each cross-attention layer: which queries of the edited rows have nothing left to see, bool [E, S, 1] for
# each piece of queries that its attention ran on.
Blind = dict[int, list[torch.Tensor]]


def image_keys(vlm: VisionLanguageModel, layer: int, prompt: Prompt, image: int) -> tuple[int, int]:
    """[start, stop) of the image among the keys of a layer."""
    if not vlm.reads_across(layer):
        return prompt.spans[image]
    count = vlm.vision_keys
    return image * count, (image + 1) * count


def blinded(read: torch.Tensor, bound: torch.Tensor, seen: torch.Tensor, blind: list[torch.Tensor]):
    """What edited rows read [E, H, S, D], nothing where a bound query [E, 1, S, 1] sees no key of
    `seen` [E, 1, S, T]; such queries are noted in `blind`."""
    nothing = bound & ~seen.any(-1, keepdim=True)
    blind.append(nothing[:, 0])
    return read.masked_fill(nothing, 0)


def skip_mlp(vlm: VisionLanguageModel, blind: Blind, rows: dict[int, Sequence[int]], undo: ExitStack) -> None:
    """Zero, in the cross-attention layers `blind`, the MLP's output where a query had nothing left to see.

    Args:
        rows: the edited rows of each layer, in the order in which `blind` holds them.
        undo: is given what removes the hooks.
    """
    for layer in blind:
        mlp = getattr(vlm.layers[layer], vlm.family.mlp)
        undo.callback(mlp.register_forward_hook(_skip(blind[layer], rows.get(layer, ()))).remove)


def _skip(blind: list[torch.Tensor], rows: Sequence[int]) -> Callable:
    def hook(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if not blind:
            return output
        nothing, out = torch.cat(blind, dim=1), output.clone()
        blind.clear()
        out[rows] = out[rows].masked_fill(nothing, 0)
        return out

    return hook
