"""Rows longer than --max-length: set aside, shrunk, or refused, but never cut.

A length is that of the tokens the model gets, image tokens included, as the encoder makes them: nothing is
estimated. Truncation would cut through an image's tokens and leave its pixels, the best-known crash of
vision-language training ("image features and image tokens do not match"), or through an answer.

Shrinking lowers the pixel limit of one row's images until the row fits, as a smaller --max-pixels would; rows
with videos are set aside, their list of frames is what could be shorter.
Boxes written in pixels of the resized image (Qwen2.5-VL) then no longer fit the picture: use `drop` there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vfl_train.data.collator import Collator, Encoded, Encoder
from vfl_train.data.rows import Reason, Rejected, Row, RowError
from vfl_train.data.videos import open_row
from vfl_train.errors import ConfigError, DataError
from vfl_train.progress import track

if TYPE_CHECKING:
    from PIL.Image import Image

POLICIES = ("drop", "shrink-image", "error")
# None: the row fits. A number: with this pixel limit. A pair: the reason code and detail why it does not.
Verdict = None | int | tuple[str, str]
_ROUNDS = 8  # of the search for the largest pixel limit; each halves what is left, in logarithm
_FEWEST_TOKENS = 4  # an image of fewer shows nothing


@dataclass(frozen=True)
class Fitted:
    """Rows that fit, in input order; why the others do not; and the pixel limit of each shrunk row's images,
    by row number."""

    rows: list[Row]
    rejected: list[Rejected]
    limits: Mapping[int, int] = field(default_factory=dict)


class FittingCollator(Collator):
    """The collator, with a pixel limit of their own for the rows in `limits` (by row number)."""

    def __init__(self, encoder: Encoder, limits: Mapping[int, int]) -> None:
        super().__init__(encoder)
        self.limits = limits

    def max_pixels(self, row: Row) -> int | None:
        """The limit of this row's images, None where the processor's own counts."""
        return self.limits.get(row.row)


def pixel_limits(processor: Any) -> tuple[int, int] | None:
    """(fewest, most) pixels an image is resized to, or None for a processor that has no such limits."""
    size = getattr(getattr(processor, "image_processor", None), "size", None) or {}
    try:
        return int(size["shortest_edge"]), int(size["longest_edge"])
    except (KeyError, TypeError):
        return None


def judge_rows(rows: Sequence[Row], encoder: Encoder, max_length: int, policy: str) -> list[Verdict]:
    """What becomes of each row under `policy`. Every row is encoded once, in threads.

    Raises:
        ConfigError: shrink-image with a processor that has no pixel limit.
        DataError: policy error, naming the first row that is too long.
    """
    if policy == "shrink-image" and pixel_limits(encoder.processor) is None:
        kind = type(encoder.processor.image_processor).__name__
        raise ConfigError(
            f"--overlong shrink-image: the image processor ({kind}) of this model has no pixel limit",
            "use --overlong drop",
        )
    judge = _Judge(encoder, max_length, policy)
    verdicts = [judge(row) for row in rows[:1]]  # the tokenizer sets itself up in the first call, alone
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        verdicts += track(pool.map(judge, rows[1:]), max(0, len(rows) - 1), "row lengths")
    return verdicts


def fitted(rows: Sequence[Row], verdicts: Sequence[Verdict], max_length: int) -> Fitted:
    """The rows that `judge_rows` let through. Raises DataError if there are none."""
    judged = list(zip(rows, verdicts, strict=True))
    rejected = [
        Rejected(row.row, row.id, Reason(verdict[0]), verdict[1], row.line)
        for row, verdict in judged
        if isinstance(verdict, tuple)
    ]
    if len(rejected) == len(rows):
        detail = f"row {rejected[0].row}: {rejected[0].detail}" if rejected else "there is none"
        raise DataError(
            f"none of {len(rows)} rows can be used with --max-length {max_length}; {detail}",
            "raise --max-length, or lower --max-pixels",
        )
    kept = [row for row, verdict in judged if not isinstance(verdict, tuple)]
    return Fitted(kept, rejected, {row.row: v for row, v in judged if isinstance(v, int)})


@dataclass(frozen=True)
class _Judge:
    """The verdict on one row."""

    encoder: Encoder
    max_length: int
    policy: str

    def __call__(self, row: Row) -> Verdict:
        try:
            images, videos = open_row(row)
            encoded = self.encoder.encode(row.messages, images, videos)
            if encoded.length <= self.max_length:
                return None
            detail = f"{encoded.length} tokens, --max-length is {self.max_length}"
            if self.policy == "error":
                where = f"row {row.row}" + (f" (line {row.line})" if row.line else "")
                fix = "raise --max-length, or give --overlong drop or shrink-image"
                raise DataError(f"{where} of {row.source}, id {row.id or '-'}, has {detail}", fix)
            if self.policy == "shrink-image" and videos:
                detail += ", and frames of videos are not shrunk"
            elif self.policy == "shrink-image" and images:
                limit = self._largest_limit(row, images, encoded)
                if limit is not None:
                    return limit
                detail += ", and its images cannot be shrunk so far"
            raise RowError(Reason.too_long, detail)
        except RowError as error:
            return str(error.code), error.detail

    def _largest_limit(self, row: Row, images: Sequence[Image], full: Encoded) -> int | None:
        """The largest pixel limit at which the row fits, to about 2 % of its logarithmic range."""
        fewest, most = pixel_limits(self.encoder.processor) or (0, 0)
        largest = min(most, max(fewest, *(image.width * image.height for image in images)))
        tokens = sum(int((full.inputs["input_ids"] == i).sum()) for i in self.encoder.placeholder_ids)
        if full.length - tokens + _FEWEST_TOKENS * len(images) > self.max_length:
            return None  # the text alone is too long
        # What _FEWEST_TOKENS cost, if all images were as large as the largest.
        low = largest * _FEWEST_TOKENS * len(images) // max(tokens, 1)
        return _search(lambda limit: self._fits(row, images, limit), max(low, 1), largest)

    def _fits(self, row: Row, images: Sequence[Image], limit: int) -> bool:
        return self.encoder.encode(row.messages, images, max_pixels=limit).length <= self.max_length


def _search(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest of `_ROUNDS` tried values in [low, high] that fits, by bisection in logarithm; None if low
    does not fit."""
    if low >= high or not fits(low):
        return None
    best = low
    for _ in range(_ROUNDS):
        middle = round(math.sqrt(best * high))
        if middle in (best, high):
            break
        if fits(middle):
            best = middle
        else:
            high = middle
    return best
