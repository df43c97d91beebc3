"""Fixed prompts on which a saved model must answer as it did before it was saved.

The reference kept beside a model holds, for each prompt, the 32 largest next-token logits and 32 more
spread over the vocabulary: a few kilobytes, and enough to notice any change of weights or preprocessing.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from PIL import Image

REFERENCE = "logits_reference.json"
SAMPLES = 4
_SIDE, _KEPT = 64, 32  # pixels, logits
_QUESTIONS = ("what is in the image ?", "how many objects are there ?", "what text is written ?")
# Largest difference of two logits, as a share of the largest logit. float32 leaves room for another order
# of summation, the 16-bit formats for the rounding of weights and activations.
BOUNDS = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 5e-3}


def sample_inputs(processor: Any, count: int = SAMPLES, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """`count` prompts with one image each, as the processor returns them (batch of one)."""
    rng = np.random.default_rng(seed)
    inputs = []
    for index in range(count):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels.repeat(_SIDE // 8, axis=0).repeat(_SIDE // 8, axis=1))
        content = [{"type": "image"}, {"type": "text", "text": _QUESTIONS[index % len(_QUESTIONS)]}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs.append(dict(processor(text=[text], images=[[image]], return_tensors="pt")))
    return inputs


@torch.no_grad()
def next_logits(model: Any, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Next-token logits [V] of each prompt, float32 on the CPU."""
    device, dtype = model.device, model.dtype
    out = []
    for sample in inputs:
        moved = {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in sample.items()}
        out.append(model(**moved, use_cache=False).logits[0, -1].float().cpu())
    return out


def relative_difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Largest |a - b| over all prompts, divided by the largest |b|."""
    largest = max(float(y.abs().max()) for y in b)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / max(largest, 1e-30)


def make_reference(model: Any, processor: Any, seed: int = 0) -> dict[str, Any]:
    """The reference of a model in eval mode, as plain JSON."""
    inputs = sample_inputs(processor, SAMPLES, seed)
    prompts = []
    for sample, logits in zip(inputs, next_logits(model, inputs), strict=True):
        spread = torch.linspace(0, len(logits) - 1, min(_KEPT, len(logits))).long()
        ids = torch.cat([logits.topk(min(_KEPT, len(logits))).indices, spread]).unique()
        prompts.append(
            {"tokens": _digest(sample["input_ids"]), "ids": ids.tolist(), "logits": logits[ids].tolist()}
        )
    dtype = str(model.dtype).removeprefix("torch.")
    return {"seed": seed, "dtype": dtype, "device": model.device.type, "prompts": prompts}


def compare_reference(
    reference: dict[str, Any], inputs: list[dict[str, torch.Tensor]], logits: list[torch.Tensor]
) -> tuple[float, bool]:
    """(relative difference to the reference, whether the processor made the same tokens) over the prompts
    that both have."""
    pairs = list(zip(reference["prompts"], inputs, logits, strict=False))
    same = all(entry["tokens"] == _digest(sample["input_ids"]) for entry, sample, _ in pairs)
    ours = [full[torch.tensor(entry["ids"])] for entry, _, full in pairs]
    return relative_difference(ours, [torch.tensor(entry["logits"]) for entry, _, _ in pairs]), same


def _digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(str(ids.flatten().tolist()).encode()).hexdigest()[:16]
