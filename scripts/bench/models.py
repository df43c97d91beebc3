"""A random Qwen2.5-VL of any size and a batch of images for it, for benchmarks. Nothing is downloaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vfl_train.interventions.readout import Prompt

IMAGE, VISION_START, VISION_END, FIRST_WORD = 5, 3, 4, 8  # token ids; words are all above


@dataclass(frozen=True)
class Decoder:
    """Sizes of the language model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int


@dataclass(frozen=True)
class Shape(Decoder):
    """Model and input sizes. `prefix`: tokens up to the image's last; `suffix`: tokens after it that are
    fed, forced answer tokens included (the last answer token is predicted, not fed)."""

    prefix: int = 600
    suffix: int = 40
    answer: int = 4
    batch: int = 4

    @property
    def tokens(self) -> int:
        """Tokens of one sequence that are fed."""
        return self.prefix + self.suffix

    @property
    def limit_p1(self) -> float:
        """Cost of the engine's sweep in plain forwards if nothing but token-layers took time."""
        return 1 + self.suffix * (self.layers + 1) / (2 * self.tokens)

    @property
    def token_layers(self) -> int:
        """What the engine's sweep computes for the batch, the last layer apart: the prefix and the base row
        at every layer, and at layer l the l + 1 branches that have begun."""
        below = self.layers - 1
        return self.batch * (self.tokens * below + self.suffix * below * self.layers // 2)


# cpu: the proportions of Qwen2.5-VL-3B (intermediate 5.4 x hidden, few KV heads) at width 512, with a head
# that costs a token 3.3 layers, as the real ones do. tiny: for the test.
PRESETS = {
    "cpu": Shape(512, 12, 8, 2, 2752, 32000),
    "7b": Shape(3584, 28, 28, 4, 18944, 152064, batch=8),
    "tiny": Shape(32, 3, 4, 2, 48, 64, prefix=24, suffix=6, answer=2, batch=2),
}


class FeatureTower(torch.nn.Module):
    """Stands where the vision tower is: its "pixels" [4 N, hidden / 4] are the features [N, hidden]."""

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden, self.dtype, self.spatial_merge_size = hidden, dtype, 2

    def forward(self, pixels: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> Any:
        features = pixels.reshape(-1, self.hidden)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=features)


def random_model(
    sizes: Decoder, device: str, dtype: torch.dtype, text: dict[str, Any], vision: dict[str, Any], **ids: int
) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL, made on `device` in `dtype`. `text` and `vision`: what their configs hold beside
    `sizes`; `ids`: the tokens that the model knows."""
    half = sizes.hidden // sizes.heads // 2
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": sizes.hidden, "intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads, "vocab_size": sizes.vocab,
            "max_position_embeddings": 8192, "bos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                                "mrope_section": [half - half * 3 // 8 * 2, half * 3 // 8, half * 3 // 8]},
            **text,
        },
        vision_config={**vision, "out_hidden_size": sizes.hidden},
        **ids,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)


def build_model(shape: Shape, device: str, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """A random model whose images come as features."""
    model = random_model(
        shape, device, dtype,
        text={"pad_token_id": 0, "eos_token_id": 1},
        vision={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2},
        image_token_id=IMAGE, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
    )  # fmt: skip
    model.model.visual = FeatureTower(shape.hidden, dtype)
    return model.eval()


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """Other module objects around the same weights, for tools that leave their hooks on a model."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


@dataclass(frozen=True)
class Batch:
    """One batch, as each side takes it. Peers: `inputs` of the language model with the images' features
    in their place, `mask` additive [1, 1, T, T] for the touched layer, `answers` [B, A]. Ours: `prompts`."""

    shape: Shape
    prompts: list[Prompt]
    answers: torch.Tensor
    inputs: dict[str, Any]
    mask: torch.Tensor


def build_batch(model: Qwen2_5_VLForConditionalGeneration, shape: Shape) -> Batch:
    """Random images, questions and answers."""
    device, dtype = model.device, model.dtype
    rows = int((shape.prefix - 2) ** 0.5)
    columns = (shape.prefix - 2) // rows
    start, stop = shape.prefix - rows * columns, shape.prefix
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(FIRST_WORD, shape.vocab, (shape.batch, shape.tokens + 1), generator=generator)
    ids[:, start - 1], ids[:, start:stop], ids[:, stop] = VISION_START, IMAGE, VISION_END
    features = torch.randn(shape.batch, rows * columns * 4, shape.hidden // 4, generator=generator) * 0.02
    ids, features = ids.to(device), features.to(device, dtype)
    encoded = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).to(ids.dtype),
    }
    grid = torch.tensor([[1, 2 * rows, 2 * columns]], device=device)
    asked = shape.tokens + 1 - shape.answer  # the prompt's length; the answer follows
    prompts = [
        Prompt(
            {k: v[i : i + 1, :asked] for k, v in encoded.items()}
            | {"pixel_values": features[i], "image_grid_thw": grid},
            ((start, stop),),
            ((rows, columns),),
        )
        for i in range(shape.batch)
    ]

    fed = {key: value[:, : shape.tokens] for key, value in encoded.items()}
    grids = grid.repeat(shape.batch, 1)
    embeddings = model.get_input_embeddings()(fed["input_ids"])
    embeddings[fed["input_ids"] == IMAGE] = features.reshape(-1, shape.hidden)
    positions = model.model.get_rope_index(image_grid_thw=grids, **fed)[0]
    keep = torch.arange(asked - 1, shape.tokens, device=device)
    inputs = {
        "inputs_embeds": embeddings, "position_ids": positions, "use_cache": False, "logits_to_keep": keep
    }  # fmt: skip
    lowest = torch.finfo(dtype).min
    mask = torch.full((shape.tokens, shape.tokens), lowest, device=device, dtype=dtype).triu(1)
    mask[stop:, start:stop] = lowest
    return Batch(shape, prompts, ids[:, asked:], inputs, mask[None, None])


def no_processor() -> Any:
    """What VisionLanguageModel asks of a processor; the prompts here are made of ids."""
    tokenizer = SimpleNamespace(
        is_fast=True, added_tokens_decoder={}, all_special_tokens=["<eos>"], unk_token_id=None,
        pad_token_id=0, eos_token_id=1, convert_ids_to_tokens=lambda ids: [],
    )  # fmt: skip
    return SimpleNamespace(chat_template="none", tokenizer=tokenizer)
