"""Files of `--cache-prefix`: for each row the hidden states that enter a decoder layer, and what else its
batch needs except the images.

    CACHE/<16 hex of the settings>/settings.json       what all entries below depend on, in words
    CACHE/<16 hex of the settings>/layer-20/3f/3f...safetensors    one row

An entry is named by the sha256 of its row's turns and images, whatever file the row came from. It is
written under another name and renamed, so that several writers do no harm: they write the same. It is not
flushed to the disk one by one; what a power failure cuts is no valid safetensors file, thus not there. Bits
that turn over later are found by a sum when the entry is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vfl_train.data.collator import Encoded
from vfl_train.data.rows import ImageRef, Row
from vfl_train.errors import DiskError
from vfl_train.runs import disk_errors

log = logging.getLogger(__name__)
_HIDDEN, _MASK, _INPUT = "hidden", "answer_mask", "input."
_LAYER = re.compile(r"layer-(\d+)\Z")


@dataclass(frozen=True)
class Entry:
    """A row at layer a: `encoded` without its images' pixels, `hidden` [T, D] in the dtype of the model."""

    encoded: Encoded
    hidden: torch.Tensor


def without_pixels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Model inputs without what only the vision tower reads (pixel_values, pixel_attention_mask, ...); grids
    and token types stay, positions and masks are made of them."""
    return {name: value for name, value in inputs.items() if not name.startswith("pixel")}


def row_key(row: Row, max_pixels: int | None = None) -> str:
    """sha256 over what the row shows the model: its turns, the bytes of its pictures, and the pixel limit
    that is its own (None: the processor's)."""
    content = json.dumps([row.turns, [image_digest(ref) for ref in row.pictures], max_pixels])
    return hashlib.sha256(content.encode()).hexdigest()


def image_digest(ref: ImageRef) -> str:
    """sha256 over the bytes of an image as they are stored. Raises OSError."""
    if ref.path is not None:
        with ref.path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    data = ref.member.read() if ref.member is not None else ref.data
    return hashlib.sha256(data or b"").hexdigest()


class PrefixStore:
    """The entries of one model, setting and layer.

    Args:
        cache: the cache's folder; nothing is made before the first write.
        settings: whatever the hidden states depend on besides row and layer, as JSON.
        layer: the layer they enter.
    """

    def __init__(self, cache: Path, settings: Mapping[str, Any], layer: int) -> None:
        text = json.dumps(settings, sort_keys=True, indent=1)
        self.settings, self.layer = text, layer
        self.root = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = self.root / f"layer-{layer}"

    def other_layers(self) -> list[int]:
        """Layers with entries under the same settings, deepest first."""
        found = [_LAYER.match(f.name) for f in self.root.iterdir()] if self.root.is_dir() else []
        return sorted((int(m[1]) for m in found if m), reverse=True)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether there is a whole entry; one that is damaged is logged and not there."""
        path = self.path(key)
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as f:
                return (f.metadata() or {}).get("row") == key
        except (SafetensorError, OSError) as e:
            log.warning("prefix cache: %s is damaged (%s) and is computed again", path, e)
            return False

    def read(self, key: str) -> Entry:
        """The entry, memory-mapped. Raises DiskError where it is damaged or not there any more."""
        path = self.path(key)
        try:
            with safe_open(path, "pt") as f:
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
                written = (f.metadata() or {}).get("sum")
        except (SafetensorError, OSError) as e:
            raise DiskError(f"{path} cannot be read: {e}", "run the same command again") from e
        if written != _sum(tensors):
            path.unlink(missing_ok=True)  # its header is whole: `has` would take it
            raise DiskError(f"{path} has changed since it was written", "run the same command again")
        hidden, mask = tensors.pop(_HIDDEN), tensors.pop(_MASK)
        inputs = {name.removeprefix(_INPUT): tensor for name, tensor in tensors.items()}
        return Entry(Encoded(inputs, mask), hidden)

    def write(self, key: str, entry: Entry) -> None:
        """All or nothing. Raises DiskError."""
        path = self.path(key)
        tensors = entry_tensors(entry)
        content = save(
            tensors,
            metadata={
                "format": "pt", "row": key, "layer": str(self.layer),
                "dtype": str(entry.hidden.dtype).removeprefix("torch."), "sum": _sum(tensors),
            },
        )  # fmt: skip
        with disk_errors(path):
            self._write(path, content)
            if not (settings := self.root / "settings.json").exists():
                self._write(settings, self.settings.encode())

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
        try:
            with os.fdopen(descriptor, "wb") as f:
                f.write(content)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def entry_tensors(entry: Entry) -> dict[str, torch.Tensor]:
    """What of an entry goes into its file."""
    inputs = {f"{_INPUT}{name}": value for name, value in entry.encoded.inputs.items()}
    tensors = {_HIDDEN: entry.hidden, _MASK: entry.encoded.answer_mask, **inputs}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of all bytes as 64-bit words: any bit that turns over changes it, at the speed of reading them."""
    total = 0
    for tensor in tensors.values():
        content = tensor.flatten().view(torch.uint8)
        words = len(content) // 8 * 8
        total += int(content[:words].view(torch.int64).sum()) + int(content[words:].sum())
    return str(total)
