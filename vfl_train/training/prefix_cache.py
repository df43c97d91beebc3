"""`--cache-prefix`: what lies below the lowest trained layer is computed once a row, not once a step.

Nothing below layer a is trained, so the hidden states that enter it are the same in every epoch and in
every later run whose adapters lie at a or above. They are computed once for all rows, kept in files (T x D
numbers a row, 5 MB for 700 tokens of a 7B model in bfloat16), and training begins from them: no vision
tower, no layers below a, no image is opened. A step then costs 2 (L - a) + 2 H layer forwards instead of
L + (L - a) + 2 H + V (L layers; H the head, V the vision tower in layer forwards). Validation rows are not
cached: they run whole.

It is refused where it would be wrong: dropout or trained parameters below, images that are processed
differently each time, models whose upper layers get more of the image than those hidden states; and under
ZeRO-3 (see `deepspeed.check`).
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from vfl_train import __version__
from vfl_train.data.collator import Collator, Encoded, collate
from vfl_train.errors import ConfigError, DiskError
from vfl_train.progress import track
from vfl_train.training.distributed import exchange, world
from vfl_train.training.estimate import size
from vfl_train.training.frozen import lowest_trained
from vfl_train.training.prefix_start import PREFIX_STATES, beginning_at, refusal, states_at
from vfl_train.training.prefix_store import Entry, PrefixStore, entry_tensors, row_key, without_pixels

if TYPE_CHECKING:
    from vfl_train.config import LoraConfig
    from vfl_train.data.rows import Row
    from vfl_train.models import VisionLanguageModel
    from vfl_train.training.plan import LayerPlan

VERSION = 2  # of what an entry holds and means
Batch = dict[str, Any]
_PACKAGES = ("torch", "torchvision", "transformers", "pillow")  # they decide on pixels, tokens and rounding
_SAMPLE = 16  # rows whose size the estimate is made from
_BLOCK = 4096  # bytes a file takes at least
_MARGIN = 1.05
_THREADS = 8  # reading files leaves Python's lock
log = logging.getLogger(__name__)


class PrefixCollator:
    """Batches that begin at the cached layer; rows without an entry (rows of another file) run whole, unless
    they share a batch with none that has one."""

    def __init__(self, collator: Collator, store: PrefixStore, keys: Mapping[str, str]) -> None:
        self.collator, self.store, self.keys = collator, store, keys

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """The batch of `collate` without pixel values, with `PREFIX_STATES` [B, T, D], zero at padding.

        Raises:
            DiskError: an entry has gone or is damaged.
        """
        if not all(row.uid in self.keys for row in rows):
            return self.collator(rows)
        entries = [self.store.read(self.keys[row.uid]) for row in rows]
        batch = collate([entry.encoded for entry in entries], self.collator.pad_token_id)
        length, first = batch["input_ids"].shape[1], entries[0].hidden
        states = first.new_zeros(len(entries), length, first.shape[1])
        for index, entry in enumerate(entries):
            states[index, : len(entry.hidden)] = entry.hidden
        return {**batch, PREFIX_STATES: states}


@contextmanager
def prefix_cached(
    vlm: VisionLanguageModel,
    model: nn.Module,
    plan: LayerPlan,
    rows: Sequence[Row],
    collator: Collator,
    config: LoraConfig,
    *,
    digest: str,
    autocast: torch.dtype | None,
) -> Iterator[PrefixCollator]:
    """Fill the cache for `rows` and let `model` begin at the cached layer inside. Yields the collator that
    training then uses; call it where LoRA is on the model and nothing else has wrapped it.

    Args:
        model: what is called in training, vlm.model under PEFT.
        rows: those to be cached.
        digest: `weights_digest` of the model.
        autocast: the dtype that training computes in where that is not the model's.

    Raises:
        ConfigError: it would be wrong here; the message says why.
        DiskError: the estimated size does not fit (nothing is written then), or writing failed.
        RowError: a row cannot be encoded.
    """
    lowest = check_possible(vlm, plan)
    cache = cache_folder(config)
    settings = cache_settings(vlm, digest, autocast)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda row: (row.uid, row_key(row, collator.max_pixels(row))), rows)
        keys = dict(track(found, len(rows), "prefix cache: reading rows"))
    store, missing = _choose_store(cache, settings, lowest, rows, keys)
    if missing:
        _check_row(vlm, collator, rows, missing, store.layer, autocast)
        _check_space(vlm, collator, rows, missing, store, cache)
    _fill(vlm, collator, rows, missing, keys, store, config, autocast)
    log.info("prefix cache: %d rows begin at layer %d, from %s", len(keys), store.layer, store.folder)
    with beginning_at(vlm, model, store.layer):
        yield PrefixCollator(collator, store, keys)


def cache_folder(config: LoraConfig) -> Path:
    """Where the cache lies: --cache-dir, or `prefix-cache` beside the output."""
    return config.cache_dir or Path(config.output).absolute().parent / "prefix-cache"


def check_possible(vlm: VisionLanguageModel, plan: LayerPlan) -> int:
    """The layer to cache at, whether or not LoRA is on the model yet. Raises ConfigError where it would be
    wrong, as far as the model and the plan can tell."""
    fix = "leave --cache-prefix out"
    lowest = lowest_trained(vlm, plan)
    if lowest is None:
        raise ConfigError("--cache-prefix: something before the decoder is trained (--also-adapt)", fix)
    if lowest == 0:
        raise ConfigError("--cache-prefix: layer 0 is trained, there is nothing below to keep", fix)
    above = {m for layer in vlm.layers[lowest:] for m in layer.modules()}
    for name, module in vlm.base.named_modules():
        if module in above:
            continue
        if rate := _dropout(module):
            where = f"{name or 'the model'} drops out {rate:g} of its values"
            raise ConfigError(f"--cache-prefix: {where}, so each step sees others", fix)
    return lowest


def _dropout(module: nn.Module) -> float:
    """The share that a module drops in training: nn.Dropout's, or what its functional dropout is given."""
    named = {n: v for n, v in vars(module).items() if "drop" in n and isinstance(v, float)}
    return max([*named.values(), float(module.p) if isinstance(module, nn.Dropout) else 0.0])


def cache_settings(vlm: VisionLanguageModel, digest: str, autocast: torch.dtype | None) -> dict[str, Any]:
    """All that the hidden states of a row depend on besides the row and the layer. The processor's part holds
    --max-pixels."""
    return {
        "version": VERSION,
        "model": vlm.name_or_path,
        "revision": vlm.revision,
        "weights": digest,
        "dtype": vlm.dtype,
        "autocast": str(autocast).removeprefix("torch.") if autocast else None,
        "quantization": str(getattr(vlm.base, "quantization_method", None) or "none"),
        "attention": vlm.text_config._attn_implementation,
        "device": vlm.device.type,
        "processor": processor_digest(vlm.processor),
        "versions": {"vfl-train": __version__, **{name: metadata.version(name) for name in _PACKAGES}},
    }


def processor_digest(processor: Any) -> str:
    """sha256 of the files that `processor` would be saved as: tokenizer, chat template, image sizes."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="vfl-processor-") as folder:
        processor.save_pretrained(folder)
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _choose_store(
    cache: Path, settings: Mapping[str, Any], lowest: int, rows: Sequence[Row], keys: Mapping[str, str]
) -> tuple[PrefixStore, list[int]]:
    """The store to use and the positions of rows that it lacks: the one at `lowest`, or a complete one of an
    earlier run at a lower layer."""
    store = PrefixStore(cache, settings, lowest)
    present = {key for key in set(keys.values()) if store.has(key)}
    if len(present) < len(set(keys.values())):
        for layer in (n for n in store.other_layers() if 0 < n < lowest):
            other = PrefixStore(cache, settings, layer)
            if all(other.has(key) for key in set(keys.values())):
                return other, []
    positions: dict[str, int] = {}
    for position, row in enumerate(rows):
        if (key := keys[row.uid]) not in present:
            positions.setdefault(key, position)  # equal rows share an entry
    return store, list(positions.values())


def _check_row(
    vlm: VisionLanguageModel,
    collator: Collator,
    rows: Sequence[Row],
    missing: Sequence[int],
    layer: int,
    autocast: torch.dtype | None,
) -> None:
    """Raises ConfigError unless a row is encoded the same twice and its batch may begin at `layer`."""
    position = max(missing, key=lambda n: (bool(rows[n].videos), bool(rows[n].images)))
    once, again = collator.encode(rows[position]), collator.encode(rows[position])
    for name, value in once.inputs.items():
        if not isinstance(value, torch.Tensor):
            raise ConfigError(f"--cache-prefix: the processor's {name} is not a tensor", "leave it out")
        if not torch.equal(value, again.inputs[name]):
            raise ConfigError(
                f"--cache-prefix: the processor makes other {name} of the same row each time (augmentation)",
                "switch that off in the processor, or leave --cache-prefix out",
            )
    batch = collate([once], collator.pad_token_id)
    if reason := refusal(vlm, batch, layer, autocast):
        raise ConfigError(f"--cache-prefix: {reason}", "leave it out, or train higher layers only")


def _check_space(
    vlm: VisionLanguageModel,
    collator: Collator,
    rows: Sequence[Row],
    missing: Sequence[int],
    store: PrefixStore,
    cache: Path,
) -> None:
    """Log how large the missing entries will be; raises DiskError if that does not fit."""
    sample = [collator.encode(rows[n]) for n in missing[:: -(-len(missing) // _SAMPLE)]]
    a_row = sum(_bytes(vlm, encoded) for encoded in sample) / len(sample)
    needed = int(a_row * len(missing))
    existing = next(p for p in (cache.absolute(), *cache.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    log.info(
        "prefix cache: hidden states (%s) of %d rows at layer %d, about %s a row, %s in all, to %s (%s free)",
        vlm.dtype, len(missing), store.layer, size(a_row), size(needed), store.folder, size(free),
    )  # fmt: skip
    if needed * _MARGIN > free:
        raise DiskError(
            f"--cache-prefix needs about {size(needed)} in {cache}, where {size(free)} are free",
            "give --cache-dir on another disk, or leave --cache-prefix out",
        )


def _bytes(vlm: VisionLanguageModel, encoded: Encoded) -> int:
    """What the entry of `encoded` takes on the disk."""
    hidden = torch.empty(encoded.length, vlm.hidden_size, dtype=vlm.model.dtype, device="meta")
    rest = entry_tensors(Entry(_stored(encoded), torch.empty(0)))
    size = hidden.nbytes + sum(t.nbytes for t in rest.values())
    return -(-size // _BLOCK) * _BLOCK + _BLOCK


def _stored(encoded: Encoded) -> Encoded:
    return Encoded(without_pixels(encoded.inputs), encoded.answer_mask)


def _fill(
    vlm: VisionLanguageModel,
    collator: Collator,
    rows: Sequence[Row],
    missing: Sequence[int],
    keys: Mapping[str, str],
    store: PrefixStore,
    config: LoraConfig,
    autocast: torch.dtype | None,
) -> None:
    """Compute and write the entries of `missing`, in batches as large as training's: each process its share,
    then whatever is missing here still, as where disks are not shared. All processes call it, those that miss
    nothing too."""

    def encode(positions: Iterable[int]) -> list[tuple[str, Encoded]]:
        return [(keys[rows[n].uid], collator.encode(rows[n])) for n in positions]

    def fill(todo: Sequence[int]) -> None:
        loader: DataLoader = DataLoader(
            todo,  # type: ignore[arg-type]  # any sequence does
            config.per_device_train_batch_size,
            collate_fn=encode,
            num_workers=config.dataloader_num_workers,
        )
        for batch in track(loader, len(loader), "prefix cache"):
            inputs = collate([each for _, each in batch], collator.pad_token_id)
            hidden = states_at(vlm, inputs, store.layer, autocast)
            for (key, encoded), states in zip(batch, hidden, strict=True):
                store.write(key, Entry(_stored(encoded), states[: encoded.length]))

    here = world()
    fill(missing[here.rank :: here.size])
    exchange(None, "the prefix cache", patience=float("inf"))
    if here.size > 1:
        fill([n for n in missing if not store.has(keys[rows[n].uid])])
        exchange(None, "the end of the prefix cache", patience=float("inf"))
