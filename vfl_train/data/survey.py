"""What is in a data set: rows kept and refused, repeats, boxes, lengths. One pass, a few bytes a row."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vfl_train.data.boxes import EXAMPLES, MAX_LISTED, BoxCensus, boxes_in
from vfl_train.data.images import encoded_bytes, image_size
from vfl_train.data.pool import Pool
from vfl_train.data.rows import ImageRef, Reason, Rejected, Row, RowError, one_line, reject
from vfl_train.data.videos import open_row

if TYPE_CHECKING:
    from vfl_train.data.collator import Encoder

FLAGS = {  # what is counted and shown, but never a reason to refuse a row
    "duplicate_id": "rows whose id an earlier row has",
    "duplicate_row": "rows with the turns and images of an earlier row",
    "duplicate_image": "images that repeat another file or cell, byte for byte",
    "box_outside": "rows with a box outside their image",
    "over_long": "rows longer than --max-length",
}


@dataclass
class Flag:
    """Rows with one peculiarity: how many, the numbers of the first of them, and some explained."""

    count: int = 0
    rows: list[int] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    def add(self, row: int, example: str) -> None:
        """Count one row."""
        self.count += 1
        if len(self.rows) < MAX_LISTED:
            self.rows.append(row)
        if len(self.examples) < EXAMPLES:
            self.examples.append(one_line(f"row {row}: {example}"))


class Survey:
    """Counts over the rows of a data set, given to `add` one by one, in order."""

    def __init__(self, pool: Pool, encoder: Encoder | None = None, max_length: int | None = None) -> None:
        """With an `encoder` every row is encoded too, for its length and what the model makes of it."""
        self.pool, self.encoder, self.max_length = pool, encoder, max_length
        self.n_read = self.n_kept = 0
        self.rejected: list[Rejected] = []
        self.flags = {name: Flag() for name in FLAGS}
        self.boxes = BoxCensus()
        self.images_a_row: Counter[int] = Counter()
        self.videos_a_row: Counter[int] = Counter()
        self.answer_lengths: Counter[int] = Counter()  # characters
        self.token_lengths: Counter[int] = Counter()
        self.sources: Counter[str] = Counter()
        self._ids: dict[int, int] = {}  # of each digest, the first row
        self._rows: dict[int, int] = {}
        self._names: dict[int, int] = {}  # of each image's name, the digest of its content
        self._contents: dict[int, int] = {}  # of each content, the name of the first image
        self._answers: set[int] = set()

    def run(self, entries: Iterable[Row | Rejected]) -> Survey:
        """Add all of `entries`, the rows of the pool from the first on."""
        for entry in entries:
            self.add(entry)
        if self.n_read != self.n_kept + len(self.rejected):
            raise RuntimeError(f"{self.pool.path}: {self.totals()}")
        return self

    def add(self, entry: Row | Rejected) -> None:
        """Count one row."""
        if entry.row != self.n_read:
            raise RuntimeError(f"{self.pool.path}: row {entry.row} where {self.n_read} is due")
        self.n_read += 1
        if isinstance(entry, Row):
            try:
                self._add(entry)
                self.n_kept += 1
            except RowError as error:
                entry = reject(entry, error)
        if isinstance(entry, Rejected):
            self.rejected.append(entry)

    def counts(self) -> dict[str, int]:
        """Quarantined rows per reason code, most frequent first, then by name."""
        tally = Counter(str(entry.code) for entry in self.rejected)
        return dict(sorted(tally.items(), key=lambda item: (-item[1], item[0])))

    def totals(self) -> str:
        """`2000 read = 1712 kept + 288 quarantined`."""
        return f"{self.n_read} read = {self.n_kept} kept + {len(self.rejected)} quarantined"

    def findings(self) -> dict[str, Flag]:
        """The flags that any row has, boxes included."""
        count, rows, examples = self.boxes.outside
        found = {**self.flags, "box_outside": Flag(count, rows, [one_line(e) for e in examples])}
        return {name: flag for name, flag in found.items() if flag.count}

    def as_dict(self) -> dict[str, Any]:
        """report.json."""
        return {
            "schema_version": 1,
            "data": {"name": self.pool.path.name, "format": self.pool.format, "sha256": self.pool.sha256},
            "rows_read": self.n_read,
            "rows_kept": self.n_kept,
            "rows_quarantined": len(self.rejected),
            "quarantine": self.counts(),
            "flags": {
                name: {"count": flag.count, "first_rows": flag.rows, "examples": flag.examples}
                for name, flag in self.findings().items()
            },
            "images_a_row": {str(n): self.images_a_row[n] for n in sorted(self.images_a_row)},
            "videos_a_row": {str(n): self.videos_a_row[n] for n in sorted(self.videos_a_row)},
            "answers": {"count": self.answer_lengths.total(), "different": len(self._answers)},
            "boxes": {"count": self.boxes.boxes, "coordinates": self.boxes.kind or None},
            "tokens": spread(self.token_lengths),
            "sources": dict(largest(self.sources)),
        }

    def _add(self, row: Row) -> None:
        length = None if self.encoder is None else _length(self.encoder, row)
        images = [self._image(row, ref) for ref in row.pictures]
        text = "\n".join(message.text for message in row.messages)
        if boxes := list(boxes_in(text)):
            sizes = [image_size(ref) for ref in row.images]
            if sizes:
                self.boxes.add(row.row, boxes, sizes)
        # From here on nothing raises: a row is counted once, or not at all.
        if length is not None:
            self.token_lengths[length] += 1
            if self.max_length is not None and length > self.max_length:
                self.flags["over_long"].add(row.row, f"{length} tokens")
        self._repeats(row, images)
        self.images_a_row[len(row.images)] += 1
        self.videos_a_row[len(row.videos)] += 1
        self.sources[row.source] += 1
        for message in row.messages:
            if message.role == "assistant":
                self.answer_lengths[len(message.text)] += 1
                self._answers.add(_digest(message.text.encode("utf-8", "surrogatepass")))

    def _repeats(self, row: Row, images: Sequence[int]) -> None:
        if not row.id.startswith("#"):  # "#7" is a row without a name
            first = self._ids.setdefault(_digest(row.id.encode("utf-8", "surrogatepass")), row.row)
            if first != row.row:
                self.flags["duplicate_id"].add(row.row, f"id {row.id} as row {first}")
        content = json.dumps([row.turns, images]).encode("ascii")
        first = self._rows.setdefault(_digest(content), row.row)
        if first != row.row:
            self.flags["duplicate_row"].add(row.row, f"repeats row {first}")

    def _image(self, row: Row, ref: ImageRef) -> int:
        """The digest of an image's bytes; each file is read once. Raises RejectedImage."""
        name = _digest(str(ref.path or ref.member or ref.label).encode("utf-8", "surrogatepass"))
        known = self._names.get(name)
        if known is not None:
            return known
        content = _digest(ref.data if ref.data is not None else encoded_bytes(ref))
        self._names[name] = content
        if self._contents.setdefault(content, name) != name:
            self.flags["duplicate_image"].add(row.row, ref.label)
        return content


def _length(encoder: Encoder, row: Row) -> int:
    """Tokens of the row. Raises RowError if it cannot be encoded or nothing of it would be trained on."""
    encoded = encoder.encode(row.messages, *open_row(row))
    if encoded.n_answer_tokens == 0:
        raise RowError(Reason.no_answer, "no token of the row is an answer's")
    return encoded.length


def spread(lengths: Counter[int]) -> dict[str, int] | None:
    """Median and longest of counted lengths, None where there are none."""
    total = lengths.total()
    if not total:
        return None
    passed = 0
    for length in sorted(lengths):
        passed += lengths[length]
        if 2 * passed >= total:
            return {"median": length, "longest": max(lengths)}
    raise AssertionError("counts add up")


def largest(counts: Counter[str], limit: int = 10) -> list[tuple[str, int]]:
    """The most frequent, then by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
