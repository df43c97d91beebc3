"""What a family may say of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How a family departs from the default.

    `attention`, `mlp`: names inside a decoder layer.
    `linears`: module names inside a decoder layer that LoRA may adapt; `moe`: name suffixes that mark a
    layer's MLP as a mixture of experts (attention only is adapted then).
    `connectors`: last parts of the names of the modules between vision tower and decoder.
    `tiles`: (processor, (width, height) of an image, images in the prompt) -> how the image is laid out, as
    (columns, rows) of its tiles or tokens, where neither the tokens nor the inputs show it.
    `box`: the coordinates this family was trained to write boxes in: `pixels` of the image as the model
    gets it (resized), `relative-1000` of width and height, or None where it was not trained to.
    `adds_between_layers`: the model adds to the hidden states between decoder layers what depends on the
    image alone (deep stack), so that it can be carried over to another row of the same prompt.
    `cross_attention`: the name inside a decoder layer of the attention that reads the images, where it is not
    self-attention that does; `vision_keys`: (configuration) -> the keys that an image has there.
    `reference_only`: why rows with an image run on the reference path, in words that the reasons of `Cost`
    hold; None where the engine runs them.
    `several_images`: a prompt may hold more than one; `video`: videos are supported, a span each.
    `prepare`: what is done to a processor before it is used, where transformers' own has no form for chats.
    `refused`: the sentence, naming what is missing, with which a model of this family is refused; None where
    it is supported.
    """

    attention: str = "self_attn"
    mlp: str = "mlp"
    linears: tuple[str, ...] = (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )  # fmt: skip
    moe: tuple[str, ...] = ("mlp.experts", "mlp.gate")
    connectors: tuple[str, ...] = (
        "model.multi_modal_projector", "model.connector", "visual.merger", "visual.deepstack_merger_list",
    )  # fmt: skip
    tiles: Callable[[Any, tuple[int, int], int], tuple[int, int]] | None = None
    written: Callable[[Any, Mapping[str, Any]], dict[str, Any]] | None = None
    box: str | None = None
    adds_between_layers: bool = False
    cross_attention: str | None = None
    vision_keys: Callable[[Any], int] | None = None
    reference_only: str | None = None
    several_images: bool = True
    video: bool = False
    prepare: Callable[[Any], None] | None = None
    refused: str | None = None
