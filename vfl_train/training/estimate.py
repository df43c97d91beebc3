"""What a training run will take, before it starts: measured in its first steps, or by formula.

The probe is the run itself for three steps: same rows in the same order, same model, same settings; nothing
of it is kept. Where the weights are not on this machine, or do not fit, the closed form below is printed,
from the model's configuration and some encoded rows.

Unit model (1 unit: a forward of one decoder layer; LoRA leaves the weights frozen, so a backward is one too).
L layers, the lowest adapted one a, V the vision tower, H the output head:

    LoRA on every layer                      2 L + 2 H + V
    from layer a on                          L + (L - a) + 2 H + V
    ... layers recomputed in backward        L + 2 (L - a) + 2 H + V
    ... from a prefix cache                  2 (L - a) + 2 H

Memory: weights, 16 bytes a trained number (value, gradient, two moments of Adam, in float32), and of each
token what backward needs of a layer: about four times the inner and three times the hidden width of its
gated MLP and attention. Allocator and kernels take more: 10 % are added.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from vfl_train.data.collator import collate
from vfl_train.models.memory import free_memory, peak_memory, start_of_peak, weights_at_hand

if TYPE_CHECKING:
    from vfl_train.config import LoraConfig
    from vfl_train.models import VisionLanguageModel
    from vfl_train.training.plan import LayerPlan
    from vfl_train.training.rows import TrainingRows

STEPS = 3  # of the probe; the first warms up and is not timed
OVERHEAD = 1.1
_SAMPLE = 8  # rows that are encoded for the closed form
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """What the closed form needs to know of a model and a batch. Widths in numbers, `weights` in bytes,
    `tokens` a row, `vision_units` the cost of the vision tower in forwards of one decoder layer."""

    layers: int
    lowest: int
    hidden: int
    inner: int
    trained: int
    weights: int
    tokens: float
    vision_units: float = 0.0
    head_units: float = 0.0
    bytes_a_number: int = 2


def units(shape: Shape, lowest: int, recompute: bool = False, cached: bool = False) -> float:
    """Cost of a training step in forwards of one decoder layer, by the unit model above."""
    above = shape.layers - lowest
    if cached:
        return 2 * above + 2 * shape.head_units
    backward = 2 * above if recompute else above
    return shape.layers + backward + 2 * shape.head_units + shape.vision_units


def memory_bytes(shape: Shape, rows: int, recompute: bool = False) -> float:
    """Peak memory of a step over `rows` rows at once, by the memory formula above."""
    tokens, above = rows * shape.tokens, shape.layers - shape.lowest
    a_layer = shape.bytes_a_number * (4 * shape.inner + 3 * shape.hidden)
    kept = above * shape.bytes_a_number * shape.hidden + a_layer if recompute else above * a_layer
    return OVERHEAD * (shape.weights + 16 * shape.trained + tokens * kept)


@dataclass(frozen=True)
class Estimate:
    """`step_seconds` None: there was no probe, for the `reason` given. Sizes in bytes, times in seconds."""

    steps: int
    rows_a_step: int
    memory: float
    step_seconds: float | None
    reason: str
    adapter_bytes: float
    checkpoint_bytes: float
    checkpoints: int
    shape: Shape
    cache_bytes: float
    passes: float
    deepspeed: bool = False
    cached: bool = False

    def text(self) -> str:
        """The lines that --dry-run prints."""
        return "\n".join([*self._time_and_memory(), *self._disk(), *self._cache()])

    def _time_and_memory(self) -> list[str]:
        if self.step_seconds is None:
            share = units(self.shape, self.shape.lowest) / units(self.shape, 0)
            return [
                f"not probed: {self.reason}; by formula, from the configuration and rows of "
                f"{self.shape.tokens:.0f} tokens on average:",
                f"memory about {size(self.memory)} a device{self._without()}, of it weights "
                f"{size(self.shape.weights)}",
                f"a step costs {share:.0%} of one with LoRA on every layer (no recomputation)",
            ]
        return [
            f"probe of {STEPS} steps on one device{self._without()}: {self.step_seconds:.2f} s a step of "
            f"{self.rows_a_step} rows, memory peak {size(self.memory)}",
            self._duration(self.step_seconds),
        ]

    def _duration(self, step: float) -> str:
        """The line that says how long the run takes, from the seconds of a step without a cache."""
        total, note = self.steps * step, "(validation and saving not counted)"
        if not self.cached or self.shape.lowest == 0:
            return f"{self.steps} steps: about {duration(total)} {note}"
        whole = units(self.shape, self.shape.lowest)
        share = units(self.shape, self.shape.lowest, cached=True) / whole
        filling = total / self.passes * (1 - share)
        return (
            f"{self.steps} steps from the prefix cache: about {duration(total * share)} by the unit model, "
            f"and {duration(filling)} to fill it {note}"
        )

    def _without(self) -> str:
        return ", without DeepSpeed" if self.deepspeed else ""

    def _disk(self) -> list[str]:
        line = f"disk: adapter {size(self.adapter_bytes)}"
        if self.checkpoints:
            each = f"{self.checkpoints} checkpoints of {size(self.checkpoint_bytes)}"
            line += f", while training {each} and one being written"
        return [line]

    def _cache(self) -> list[str]:
        if self.shape.lowest == 0:
            return []
        below = units(self.shape, self.shape.lowest) - units(self.shape, self.shape.lowest, cached=True)
        faster = units(self.shape, self.shape.lowest) / units(self.shape, self.shape.lowest, cached=True)
        # Filling it costs what lies below once; each pass over the rows saves that.
        saved = (self.passes - 1) * below
        whole = self.passes * units(self.shape, self.shape.lowest)
        verdict = (
            f"it pays: {saved / whole:.0%} less time over {self.passes:g} passes"
            if self.passes > 1
            else "it pays with more than one pass over the rows, or for later runs on the same rows"
        )
        return [
            f"--cache-prefix: {size(self.cache_bytes)} on disk, steps {faster:.1f}x as fast by the unit "
            f"model; {verdict}"
        ]


def estimate(
    config: LoraConfig,
    skeleton: VisionLanguageModel,
    plan: LayerPlan,
    rows: TrainingRows,
    load: Callable[[], tuple[VisionLanguageModel, LayerPlan]],
) -> Estimate:
    """Probe the run if the model is at hand and fits, else calculate. Leaves nothing behind.

    Args:
        skeleton: the model without weights.
        load: loads the model and makes its plan.

    Raises:
        RowError: one of the first rows cannot be encoded. Else whatever stops the run itself in its first
            steps.
    """
    from vfl_train.training.launch import all_processes

    shape = shape_of(config, skeleton, plan, rows)
    by_formula = memory_bytes(shape, config.per_device_train_batch_size, config.activation_checkpointing)
    reason = _obstacle(config, by_formula)
    seconds, memory = None, by_formula
    if not reason:
        try:
            seconds, memory = probe(config, rows, load)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            reason = f"the memory of this machine ({size(free_memory(config.device))} free) was not enough"
    processes = all_processes(config)
    steps = steps_of(config, len(rows.rows), processes)
    one_pass = dataclasses.replace(config, max_steps=-1, num_train_epochs=1.0)
    an_epoch = steps_of(one_pass, len(rows.rows), processes)
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    adapter = 4.0 * plan.trainable_parameters
    return Estimate(
        steps=steps, rows_a_step=per_step, memory=memory, step_seconds=seconds, reason=reason,
        adapter_bytes=adapter, checkpoint_bytes=3 * adapter,
        checkpoints=config.save_total_limit if config.save_steps else 0, shape=shape,
        cache_bytes=len(rows.rows) * shape.tokens * shape.hidden * shape.bytes_a_number,
        passes=steps / an_epoch, deepspeed=config.deepspeed is not None,
        cached=config.cache_prefix,
    )  # fmt: skip


def steps_of(config: LoraConfig, rows: int, processes: int) -> int:
    """Optimizer steps of a run over `rows` rows in so many processes, counted as transformers does."""
    if config.max_steps > 0:
        return config.max_steps
    batches = -(-rows // (config.per_device_train_batch_size * processes))
    steps_an_epoch = max(1, -(-batches // config.gradient_accumulation_steps))
    return max(1, -int(-config.num_train_epochs * steps_an_epoch // 1))


def probe(
    config: LoraConfig,
    rows: TrainingRows,
    load: Callable[[], tuple[VisionLanguageModel, LayerPlan]],
) -> tuple[float, float]:
    """(seconds a step, peak memory in bytes) of the run's first steps, in this process alone."""
    from vfl_train.training.adapter import apply_lora
    from vfl_train.training.frozen import limit_backward
    from vfl_train.training.rows import fit
    from vfl_train.training.supervised import supervised_only
    from vfl_train.training.trainer import train

    vlm, plan = load()
    start_of_peak(vlm.device)
    rows = fit(config, rows, vlm.encoder)
    adapted = apply_lora(
        vlm.model, plan, r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout,
        seed=config.seed,
    )  # fmt: skip
    limit_backward(vlm, plan, recompute=config.activation_checkpointing)
    short = dataclasses.replace(config, max_steps=STEPS, report_to="none", save_steps=0, deepspeed=None)
    clock = _Clock(vlm.device)
    with supervised_only(vlm), tempfile.TemporaryDirectory(prefix="vfl-train-") as scratch:
        log_path = Path(scratch) / "log.jsonl"
        collator = rows.train.collator(vlm.encoder)
        train(adapted, vlm.processor, rows.rows, collator, short, log_path, callbacks=[clock])
    timed = clock.seconds[1:] or clock.seconds
    return sum(timed) / len(timed), peak_memory(vlm.device)


class _Clock(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self._start = device, list[float](), 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(self._now() - self._start)


def shape_of(config: LoraConfig, skeleton: VisionLanguageModel, plan: LayerPlan, rows: TrainingRows) -> Shape:
    """The shape of a run, from the model's configuration and some of its rows, encoded."""
    collator = rows.train.collator(skeleton.encoder)
    chosen = rows.rows[:: -(-len(rows.rows) // _SAMPLE)]
    samples = [collator.encode(row) for row in chosen]
    tokens = sum(s.length for s in samples) / len(samples)
    answered = sum(s.n_answer_tokens for s in samples) / len(samples)
    text, model = skeleton.text_config, skeleton.base
    layer = _numbers(skeleton.layers[plan.lowest_layer])
    head = model.get_output_embeddings()
    return Shape(
        layers=plan.num_layers, lowest=plan.lowest_layer, hidden=skeleton.hidden_size,
        inner=int(getattr(text, "intermediate_size", 4 * skeleton.hidden_size)),
        trained=plan.trainable_parameters, weights=_weights(config, skeleton), tokens=tokens,
        vision_units=_vision_units(skeleton, collate(samples, 0), len(samples) * tokens * layer),
        head_units=answered * _numbers(head) / (tokens * layer) if head is not None else 0.0,
        bytes_a_number=_bytes_a_number(config),
    )  # fmt: skip


def _vision_units(skeleton: VisionLanguageModel, batch: dict[str, Any], layer_cost: float) -> float:
    """Forwards of one decoder layer that the vision tower costs for `batch`: weights times patches."""
    from vfl_train.models.parts import Parts

    pixels, parts = batch.get("pixel_values"), Parts(skeleton)
    if pixels is None or parts.tower is None:
        return 0.0
    vision = getattr(skeleton.config, "vision_config", None)
    patch = getattr(vision, "patch_size", 14)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    depth = getattr(vision, "temporal_patch_size", 1) if pixels.dim() == 2 else 1
    patches = pixels.numel() / (3 * int(patch) ** 2 * int(depth))
    return patches * _numbers(parts.modules[parts.tower]) / layer_cost


def _weights(config: LoraConfig, skeleton: VisionLanguageModel) -> int:
    """Bytes of the weights as they are loaded; quantized are the decoder's layers."""
    every = _numbers(skeleton.base) * _bytes_a_number(config)
    if not (config.load_in_4bit or config.load_in_8bit):
        return every
    inside = sum(_numbers(layer) for layer in skeleton.layers)
    return round(every - inside * (_bytes_a_number(config) - (0.55 if config.load_in_4bit else 1.0)))


def _bytes_a_number(config: LoraConfig) -> int:
    on_cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    dtype = ("float32" if on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype
    return 4 if dtype == "float32" else 2


def _obstacle(config: LoraConfig, memory: float) -> str:
    """Why there can be no probe; nothing if there can."""
    if not weights_at_hand(config.model, config.revision):
        return f"the weights of {config.model} are not on this machine"
    free = free_memory(config.device)
    if memory > free:
        return f"the run needs about {size(memory)} and this machine has {size(free)} free"
    return ""


def _numbers(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
