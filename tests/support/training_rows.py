"""A tiny model with LoRA on it and rows of unequal lengths: image sizes, questions and answers differ, and
one row has no image."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from tiny_models import ALL

from vfl_train.data.collator import Collator
from vfl_train.data.readers import read_dataset
from vfl_train.data.rows import Row
from vfl_train.models import VisionLanguageModel
from vfl_train.training.adapter import apply_lora, trainable_parameters
from vfl_train.training.plan import LayerPlan, build_plan, choose_layers

SIZES = ((64, 64), (96, 64), (64, 32), None, (64, 96))
ANSWERS = ("red", "a green square", "blue and some more words", "yes", "two")


def write_rows(folder: Path, seed: int = 0) -> Path:
    """rows.jsonl with its images; None among SIZES is a row without an image."""
    rng = np.random.default_rng(seed)
    lines = []
    for index, (size, answer) in enumerate(zip(SIZES, ANSWERS, strict=True)):
        row: dict[str, Any] = {"messages": [
            {"role": "user", "content": ("<image>" if size else "") + "What is it?" + " Say." * index},
            {"role": "assistant", "content": answer},
        ]}  # fmt: skip
        if size:
            Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(
                folder / f"{index}.png"
            )
            row["images"] = [f"{index}.png"]
        lines.append(json.dumps(row))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@dataclass
class Adapted:
    """A tiny model of its own with LoRA on `layers`, and on the modules named in `extra`; its B is not zero,
    so that gradients reach its A."""

    family: str
    layers: str
    extra: tuple[str, ...] = ()
    vlm: VisionLanguageModel = field(init=False)
    plan: LayerPlan = field(init=False)
    model: PeftModel = field(init=False)
    collator: Collator = field(init=False)

    def __post_init__(self) -> None:
        self.vlm = VisionLanguageModel(*ALL[self.family](), f"tiny-{self.family}")
        plan = build_plan(choose_layers(self.vlm.info, layers=self.layers), self.vlm, 4)
        self.plan = replace(plan, module_names=(*plan.module_names, *self.extra))
        self.model = apply_lora(self.vlm.base, self.plan, r=4, alpha=8)
        torch.manual_seed(1)
        for name, parameter in trainable_parameters(self.model):
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        self.model.train()
        self.collator = Collator(self.vlm.encoder)

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Mean over answer tokens, by hand: some families scale their own."""
        batch = dict(batch)
        labels = batch.pop("labels")[:, 1:]
        logits = self.model(**batch, use_cache=False).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def gradients(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The loss's gradient of every trained parameter."""
        self.model.zero_grad()
        self.loss(batch).backward()
        return {name: p.grad.clone() for name, p in trainable_parameters(self.model)}


def rows_of(path: Path) -> list[Row]:
    return list(read_dataset(path).rows)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Of two sets of tensors with the same names, relative to the norm of each."""
    assert a.keys() == b.keys() and a
    return max(float((a[name] - b[name]).norm() / (a[name].norm() + 1e-12)) for name in a)
