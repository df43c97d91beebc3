"""A random Qwen2.5-VL with a vision tower of real proportion and one supervised batch, for training
benchmarks; and what a step costs in units of one decoder layer's forward. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from bench.models import Decoder, random_model
from transformers import Qwen2_5_VLForConditionalGeneration

from vfl_train.data.collator import IGNORE
from vfl_train.phantom.architecture import build_processor

PATCH, MERGE, TEMPORAL = 14, 2, 2


@dataclass(frozen=True)
class Tower:
    """The vision tower: the blocks in `full` attend the whole image, the others windows of 112 pixels."""

    hidden: int
    depth: int
    heads: int
    intermediate: int
    full: tuple[int, ...]


@dataclass(frozen=True)
class Shape(Decoder):
    """Model and batch. `side`: the image's side in tokens (patches are four times as many); `text`: further
    tokens, of which the last `answer` are supervised; `adapted`: the layers that ours trains."""

    tower: Tower
    adapted: tuple[int, ...]
    side: int = 24
    text: int = 124
    answer: int = 105
    batch: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a row."""
        return self.side**2 + self.text

    @property
    def lowest(self) -> int:
        """The lowest adapted layer."""
        return self.adapted[0]


# cpu: Qwen2.5-VL-3B's proportions at width 512, a tower that costs a third of the decoder; T = 700, 15 %
# supervised, as in the unit model. 7b: Qwen2.5-VL-7B itself. tiny: for the test.
SHAPES = {
    "cpu": Shape(512, 12, 8, 2, 2752, 32000, Tower(256, 6, 4, 688, (5,)), (8, 9)),
    "7b": Shape(3584, 28, 28, 4, 18944, 152064, Tower(1280, 32, 16, 3420, (7, 15, 23, 31)),
                tuple(range(20, 28)), batch=16),
    "tiny": Shape(64, 4, 4, 2, 160, 160, Tower(32, 2, 2, 64, (1,)), (2,), side=4, text=14, answer=4, batch=2),
}  # fmt: skip


def units(shape: Shape) -> dict[str, float]:
    """Forward cost of the head (H, supervised tokens only) and of the vision tower (V), in forwards of one
    decoder layer: multiply-adds of matrix products and attention, from the sizes alone."""
    d, t = shape.hidden, shape.tokens
    kv = d * shape.kv_heads // shape.heads
    layer = t * (2 * d * d + 2 * d * kv + 3 * d * shape.intermediate) + t * t * d  # causal: half of 2 T^2 d
    tower, patches = shape.tower, shape.side**2 * MERGE**2
    window = min(patches, (112 // PATCH) ** 2)
    block = patches * (4 * tower.hidden**2 + 3 * tower.hidden * tower.intermediate)
    full, windows = len(tower.full), tower.depth - len(tower.full)
    attention = 2 * patches * tower.hidden * (full * patches + windows * window)
    wide = tower.hidden * MERGE**2
    merger = shape.side**2 * (wide * wide + wide * d)
    embedding = patches * 3 * TEMPORAL * PATCH**2 * tower.hidden
    vision = tower.depth * block + attention + merger + embedding
    return {"H": shape.answer * d * shape.vocab / layer, "V": vision / layer}


def predicted(shape: Shape) -> dict[str, float]:
    """Units a step of each side. LoRA with frozen weights: backward of a layer is one unit, recomputation
    another; TRL's default recomputes and differentiates the vision tower too."""
    cost, depth, above = units(shape), shape.layers, shape.layers - shape.lowest
    head, vision = 2 * cost["H"], cost["V"]
    return {
        "trl": 3 * depth + head + 3 * vision,
        "all": 2 * depth + head + vision,
        "all_supervised": 2 * depth + head + vision,
        "ours": depth + above + head + vision,
        "ours_recomputed": depth + 2 * above + head + vision,
        "cached": 2 * above + head,
    }


def build(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Qwen2_5_VLForConditionalGeneration, Any]:
    """The model, made on `device` in `dtype`, and a processor (the phantom's: same family, small)."""
    processor = build_processor()
    tokenizer, ids = processor.tokenizer, processor.tokenizer.convert_tokens_to_ids
    tower = shape.tower
    model = random_model(
        shape, device, dtype,
        text={"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id},
        vision={
            "depth": tower.depth, "hidden_size": tower.hidden, "intermediate_size": tower.intermediate,
            "num_heads": tower.heads, "patch_size": PATCH, "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL, "window_size": 112, "fullatt_block_indexes": list(tower.full),
        },
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    return model, processor


def batch_of(model: Qwen2_5_VLForConditionalGeneration, shape: Shape) -> dict[str, torch.Tensor]:
    """Random rows [B, T] of one image each, followed by text; on the CPU, as a collator makes them."""
    generator, config = torch.Generator().manual_seed(1), model.config
    image = shape.side**2
    ids = torch.randint(20, shape.vocab, (shape.batch, shape.tokens), generator=generator)
    ids[:, 0], ids[:, 1 : 1 + image] = config.vision_start_token_id, config.image_token_id
    ids[:, 1 + image] = config.vision_end_token_id
    labels = torch.full_like(ids, IGNORE)
    labels[:, -shape.answer :] = ids[:, -shape.answer :]
    patches = shape.batch * image * MERGE**2
    grid = torch.tensor([[1, shape.side * MERGE, shape.side * MERGE]]).repeat(shape.batch, 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "labels": labels,
        "pixel_values": torch.randn(patches, 3 * TEMPORAL * PATCH**2, generator=generator),
        "image_grid_thw": grid,
    }
