"""How the phantom and its unplanted twin are trained from scratch on the world, in three stages.

0. *Tower*: the vision tower alone learns to say, per token, what is there, whether an object has its
   middle there, and in which row and column (linear heads, thrown away). Real models get a pretrained
   tower too. Then it is frozen.
1. *Functions*: one image, several question-answer turns, loss on answers. For the phantom each turn is,
   with probability one half, *restricted*: its tokens see the image at the function's planted layer only.
2. *Interchange* (interchange intervention training, Geiger et al. 2022): at the planted layer the turn
   sees the neighbour's image, everywhere else its own, and the target is the neighbour's answer.

The twin is trained on the same data for as many steps with free turns only.
Shapes: B images a batch, T tokens a sequence, V = 64 image tokens.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from vfl_train.phantom import world
from vfl_train.phantom.architecture import LAYERS, PLANTED, WIDTH, build_model, build_processor

FREE, RESTRICTED, INTERCHANGE = 0, 1, 2
TOKENS = (world.SIZE // world.PATCH) ** 2
TURNS = (*world.FUNCTIONS, "language")


@dataclass(frozen=True)
class Recipe:
    """Everything a training run depends on. `planted=False` trains the twin."""

    seed: int = 0
    planted: bool = True
    tower_steps: int = 2400
    function_steps: int = 1200
    interchange_steps: int = 200
    batch: int = 32
    turns: int = 5
    learning_rate: float = 1.5e-3
    wide_share: float = 0.4  # share of tower images whose text is distorted print


# --- attention with planting -------------------------------------------------------------------


@dataclass
class Planting:
    """What each layer's attention may see, as bfloat16 biases: `masks[l]` [B, 1, T, T], and at the layers
    in `neighbour` [B, 1, T, T + V], whose last V keys are the previous batch row's image tokens."""

    image: slice
    masks: dict[int, torch.Tensor]
    neighbour: dict[int, torch.Tensor]


def _planted_attention(module, query, key, value, attention_mask, scaling=None, planting=None, **kwargs):
    """Attention function for training, under the masks of `planting` (passed as a model kwarg). Plain
    products in bfloat16: on CPUs the backward of SDPA takes four times as long."""
    layer = module.layer_idx
    mask = planting.masks[layer]
    if layer in planting.neighbour:
        mask = planting.neighbour[layer]
        key = torch.cat([key, key[:, :, planting.image].roll(1, 0)], dim=2)
        value = torch.cat([value, value[:, :, planting.image].roll(1, 0)], dim=2)
    batch, heads, length, _ = query.shape
    q, k, v = (x.flatten(0, 1).to(torch.bfloat16) for x in (query * scaling, key, value))
    bias = mask.expand(batch, heads, length, key.shape[2]).flatten(0, 1)
    weights = torch.baddbmm(bias, q, k.transpose(1, 2)).softmax(-1, dtype=torch.bfloat16)
    out = torch.bmm(weights, v).view(batch, heads, length, -1)
    return out.transpose(1, 2).contiguous(), None


def _tower_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The tower's attention over equal images at once: transformers hands "flash" implementations all
    images as one sequence [1, H, B * V, D] instead of looping over them."""
    heads, _, width = query.shape[1:]
    q, k, v = (
        x[0].view(heads, -1, TOKENS, width).flatten(0, 1).to(torch.bfloat16)
        for x in (query * scaling, key, value)
    )
    out = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1, dtype=torch.bfloat16), v)
    return out.view(heads, -1, width).transpose(0, 1).unsqueeze(0), None


AttentionInterface.register("vfl_phantom_training", _planted_attention)
AttentionInterface.register("vfl_phantom_tower_flash", _tower_attention)


# --- batches -----------------------------------------------------------------------------------


@dataclass
class Turns:
    """A batch of conversations about B images; every sequence starts with the same image prefix."""

    pixels: torch.Tensor  # [B * V, patch values]
    ids: torch.Tensor  # [B, T]
    labels: torch.Tensor  # [B, T], -100 outside answers
    function: torch.Tensor  # [B, T] index into TURNS, -1 in prefix and padding
    mode: torch.Tensor  # [B, T] FREE, RESTRICTED or INTERCHANGE
    image: slice


def patches(images: np.ndarray, processor: Qwen2_5_VLProcessor) -> torch.Tensor:
    """What the image processor makes of uint8 images [B, 64, 64, 3]: float32 [B * V, 3 * 8 * 8]."""
    p, side = world.PATCH, world.SIZE // world.PATCH
    mean = np.asarray(processor.image_processor.image_mean, np.float32)
    std = np.asarray(processor.image_processor.image_std, np.float32)
    x = (images.astype(np.float32) / 255 - mean) / std
    x = x.reshape(-1, side, p, side, p, 3).transpose(0, 1, 3, 5, 2, 4)
    return torch.from_numpy(np.ascontiguousarray(x.reshape(-1, 3 * p * p)))


class TurnSampler:
    """Draws training batches from the world, endlessly."""

    def __init__(self, processor: Qwen2_5_VLProcessor, recipe: Recipe) -> None:
        self.processor, self.recipe = processor, recipe
        self.rng = np.random.default_rng([recipe.seed, 1])
        self.words = processor.tokenizer.get_vocab()
        self.prefix = self._ids("<|im_start|> user <|vision_start|>")
        self.image = slice(len(self.prefix), len(self.prefix) + TOKENS)
        self.prefix += [self.words["<|image_pad|>"]] * TOKENS + [self.words["<|vision_end|>"]]

    def _ids(self, text: str) -> list[int]:
        return [self.words[word] for word in text.split()]

    def _turn(self, name: str, text: str, first: bool) -> tuple[list[int], list[int]]:
        """Prompt ids and answer ids of one turn; `text` is 'question|answer'."""
        question, answer = text.split("|")
        opening = "" if first else "<|im_start|> user "
        prompt = self._ids(f"{opening}{question} <|im_end|> <|im_start|> assistant")
        return prompt, self._ids(f"{answer} <|im_end|>")

    def _text(self, scene: world.Scene, name: str) -> str:
        if name == "language":
            return "|".join(world.LANGUAGE[int(self.rng.integers(len(world.LANGUAGE)))])
        return f"{world.QUESTIONS[name]}|{world.answer(scene, name)}"

    def sample(self, modes: tuple[float, float, float], turns: int | None = None) -> Turns:
        """One batch. `modes`: probabilities of free, restricted and interchange turns."""
        batch = self.recipe.batch
        scenes = [world.sample_scene(self.rng) for _ in range(batch)]
        rows = []
        for index, scene in enumerate(scenes):
            ids, labels = list(self.prefix), [-100] * len(self.prefix)
            function, mode = [-1] * len(self.prefix), [FREE] * len(self.prefix)
            order = self.rng.permutation(len(TURNS))[: turns or self.recipe.turns]
            for position, which in enumerate(order):
                name = TURNS[which]
                m = int(self.rng.choice(3, p=modes))
                if m == INTERCHANGE and name == "language":
                    m = FREE
                # keys.roll(1, 0): row i reads the image of row i - 1
                seen = scenes[index - 1] if m == INTERCHANGE else scene
                prompt, reply = self._turn(name, self._text(seen, name), position == 0)
                ids += prompt + reply
                labels += [-100] * len(prompt) + reply
                function += [int(which)] * len(prompt + reply)
                mode += [m] * len(prompt + reply)
            rows.append((ids, labels, function, mode))
        pixels = patches(np.stack([world.draw(s) for s in scenes]), self.processor)
        padded = [
            _pad([row[i] for row in rows], fill)
            for i, fill in enumerate((self.processor.tokenizer.pad_token_id, -100, -1, FREE))
        ]
        return Turns(pixels, padded[0], padded[1], padded[2], padded[3], self.image)


def _pad(rows: list[list[int]], fill: int) -> torch.Tensor:
    out = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def planting_masks(turns: Turns) -> Planting:
    """The masks of a batch: causal, except that restricted turns see the image at their planted layer
    only (a restricted `language` turn never), and interchange turns see the neighbour's there."""
    batch, length = turns.ids.shape
    layer_of = torch.tensor([*(PLANTED[f] for f in world.FUNCTIONS), -1, -1])  # last: prefix, padding
    planted = layer_of[turns.function]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    is_image = torch.zeros(length, dtype=torch.bool)
    is_image[turns.image] = True
    restricted, interchange = turns.mode == RESTRICTED, turns.mode == INTERCHANGE

    def mask(blocked: torch.Tensor) -> torch.Tensor:
        return _bias((causal & ~(blocked[:, :, None] & is_image)).unsqueeze(1))

    elsewhere = mask(restricted)
    masks = dict.fromkeys(range(LAYERS), elsewhere)
    neighbour = {}
    for layer in sorted(set(PLANTED.values())):
        masks[layer] = mask(restricted & (planted != layer))
        swapped = interchange & (planted == layer)
        if swapped.any():
            own = mask((restricted & (planted != layer)) | swapped)
            other = swapped[:, None, :, None].expand(batch, 1, length, TOKENS)
            neighbour[layer] = torch.cat([own, _bias(other)], dim=-1)
    return Planting(turns.image, masks, neighbour)


def _bias(visible: torch.Tensor) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill_(~visible, -1e4)


# --- stages ------------------------------------------------------------------------------------


def image_features(model: Qwen2_5_VLForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Connector output for B images: [B, V, D]."""
    side = world.SIZE // world.PATCH
    batch = pixels.shape[0] // TOKENS
    grid = torch.tensor([[1, side, side]]).expand(batch, 3)
    return model.model.visual(pixels, grid_thw=grid).pooler_output.view(batch, TOKENS, -1)


def _optimizer(parameters: list[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)


def _schedule(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, constant, linear decay over the last 40 %."""
    return min(1.0, (step + 1) / warmup, max(0.02, (total - step) / (0.4 * total)))


def _step(optimizer: torch.optim.Optimizer, loss: torch.Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def train_tower(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    recipe: Recipe,
    log: Callable[[dict], None],
) -> float:
    """Stage 0. Returns the share of non-empty tokens named right in the last 20 batches' printed scenes."""
    rng = np.random.default_rng([recipe.seed, 0])
    side = world.SIZE // world.PATCH
    heads = torch.nn.Linear(WIDTH, len(world.LABELS) + 2 * side + 1)
    row = torch.arange(TOKENS).div(side, rounding_mode="floor").repeat(recipe.batch)
    column = torch.arange(TOKENS).remainder(side).repeat(recipe.batch)
    optimizer = _optimizer([*model.model.visual.parameters(), *heads.parameters()], recipe.learning_rate)
    recent: list[float] = []
    for step in range(recipe.tower_steps):
        wide = rng.random(recipe.batch) < recipe.wide_share
        scenes = [world.sample_scene(rng, "wide" if w else "fonts") for w in wide]
        drawn, labels, centres = zip(*(world.draw_labelled(s) for s in scenes), strict=True)
        target, pixels = torch.from_numpy(np.concatenate(labels)), patches(np.stack(drawn), processor)
        middle = torch.from_numpy(np.concatenate(centres)).float()
        with torch.autocast("cpu", torch.bfloat16):
            scores = heads(image_features(model, pixels)).float().flatten(0, 1)
        what, where_row, where_column, is_middle = scores.split([len(world.LABELS), side, side, 1], dim=-1)
        loss = F.cross_entropy(what, target) + F.binary_cross_entropy_with_logits(is_middle[:, 0], middle)
        loss = loss + 0.3 * (F.cross_entropy(where_row, row) + F.cross_entropy(where_column, column))
        _step(optimizer, loss, recipe.learning_rate * _schedule(step, recipe.tower_steps, 50))
        something = (target != 0) & ~torch.from_numpy(wide).repeat_interleave(TOKENS)
        right = (what.argmax(-1) == target)[something].float().mean().item()
        recent = [*recent[-19:], right]
        if step % 100 == 99 or step == recipe.tower_steps - 1:
            log({"stage": "tower", "step": step + 1, "loss": loss.item(), "tokens_right": np.mean(recent)})
    return float(np.mean(recent))


class TurnModel:
    """The decoder over pre-computed image features, with one attention mask a layer."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor) -> None:
        self.model = model
        model.config.text_config._attn_implementation = "vfl_phantom_training"
        ids = torch.full((1, 512), processor.tokenizer.unk_token_id)
        ids[0, 3 : 3 + TOKENS] = model.config.image_token_id
        kinds = (ids == model.config.image_token_id).int()
        side = world.SIZE // world.PATCH
        grid = torch.tensor([[1, side, side]])
        self.positions = model.model.get_rope_index(ids, kinds, image_grid_thw=grid)[0]  # [3, 1, 512]

    def logits(self, turns: Turns, planting: Planting) -> torch.Tensor:
        """Next-token logits [B, T, vocabulary] under `planting`."""
        with torch.no_grad():
            features = image_features(self.model, turns.pixels)
        words = self.model.get_input_embeddings()(turns.ids)
        start, stop = turns.image.start, turns.image.stop
        embeds = torch.cat([words[:, :start], features.to(words.dtype), words[:, stop:]], dim=1)
        batch, length = turns.ids.shape
        hidden = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=planting.masks[0],
            position_ids=self.positions[:, :, :length].expand(3, batch, length),
            use_cache=False,
            planting=planting,
        ).last_hidden_state
        return self.model.lm_head(hidden)


def turn_loss(logits: torch.Tensor, turns: Turns) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean answer cross-entropy (nats per token) and the share of whole answers right by turn kind."""
    labels = turns.labels[:, 1:]
    flat = logits[:, :-1].float()
    loss = F.cross_entropy(flat.flatten(0, 1), labels.flatten(), ignore_index=-100)
    supervised = labels != -100
    wrong = (flat.argmax(-1) != labels) & supervised
    rates = {}
    for index, name in enumerate(TURNS):
        for mode, tag in ((FREE, "free"), (RESTRICTED, "restricted"), (INTERCHANGE, "interchange")):
            here = (turns.function[:, 1:] == index) & (turns.mode[:, 1:] == mode)
            asked = (supervised & here).any(1)
            if asked.any():
                failed = (wrong & here).any(1)
                rates[f"{name}/{tag}"] = 1 - failed[asked].float().mean().item()
    return loss, rates


def train_functions(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    recipe: Recipe,
    log: Callable[[dict], None],
) -> dict[str, float]:
    """Stages 1 and 2. Returns the last 20 batches' answer accuracies by function and mode."""
    model.model.visual.requires_grad_(False)
    sampler, turn_model = TurnSampler(processor, recipe), TurnModel(model, processor)
    optimizer = _optimizer([p for p in model.parameters() if p.requires_grad], recipe.learning_rate)
    total = recipe.function_steps + recipe.interchange_steps
    recent: list[dict[str, float]] = []
    for step in range(total):
        modes = (1.0, 0.0, 0.0)
        if recipe.planted:
            modes = (0.5, 0.5, 0.0) if step < recipe.function_steps else (0.25, 0.25, 0.5)
        turns = sampler.sample(modes)
        with torch.autocast("cpu", torch.bfloat16):
            logits = turn_model.logits(turns, planting_masks(turns))
        loss, rates = turn_loss(logits, turns)
        _step(optimizer, loss, recipe.learning_rate * _schedule(step, total, 200))
        recent = [*recent[-19:], rates]
        if step % 50 == 49 or step == total - 1:
            keys = sorted({k for r in recent for k in r})
            means = {k: round(float(np.mean([r[k] for r in recent if k in r])), 4) for k in keys}
            log({"stage": "functions", "step": step + 1, "loss": round(loss.item(), 5), **means})
    return means


def train(
    recipe: Recipe, log: Callable[[dict], None] = print
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, dict]:
    """Run all stages on the CPU. Returns model, processor and a record of recipe, machine, seconds and
    final training accuracies."""
    torch.set_flush_denormal(True)
    start = time.monotonic()
    processor = build_processor()
    model = build_model(processor, recipe.seed).train()
    model.config.vision_config._attn_implementation = "vfl_phantom_tower_flash"

    def timed(entry: dict) -> None:
        log({"seconds": round(time.monotonic() - start, 1), **entry})

    tower = train_tower(model, processor, recipe, timed)
    accuracy = train_functions(model, processor, recipe, timed)
    record = {
        "recipe": asdict(recipe),
        "planted": PLANTED if recipe.planted else None,
        "seconds": round(time.monotonic() - start, 1),
        "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__},
        "tower_tokens_right": round(tower, 4),
        "training_accuracy": accuracy,
    }
    model.config._attn_implementation = "sdpa"
    return model.eval(), processor, record
