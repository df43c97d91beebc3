"""Text rows and image rows in one run, on every strategy.

Under ZeRO-3 every process gathers the parameters of a module when it runs it, together with all others. A
process whose batch has no image leaves the vision tower out while another runs it: they gather different
things and hang, or mix them up. So there a batch without images gets one more row with a blank image
and no supervised token. It costs the time of that row, and adds nothing to the loss or its token count.

DDP and ZeRO-2 exchange gradients only, and every adapted decoder layer runs for text too: nothing is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from vfl_train.data.collator import Collator, collate
from vfl_train.errors import ConfigError
from vfl_train.training.deepspeed import stage_of
from vfl_train.training.distributed import world

if TYPE_CHECKING:
    from vfl_train.data.rows import Row

_BLANK = (64, 64)  # pixels; the processor makes of it what it needs


def same_modules(
    collator: Collator, rows: Sequence[Row], settings: dict[str, Any] | None
) -> Callable[[Sequence[Row]], dict[str, Any]]:
    """`collator`; or, under ZeRO-3 and where rows with and without images are mixed, one whose batches all
    have an image. Raises ConfigError there for rows with videos beside others."""
    if stage_of(settings) < 3 or world().size == 1:
        return collator
    kinds = {(bool(row.images), bool(row.videos)) for row in rows}
    if len(kinds) > 1 and any(filmed for _, filmed in kinds):
        raise ConfigError(
            "ZeRO-3 cannot mix rows with videos and others: processes would run different modules",
            "use --deepspeed zero2, or rows of one kind",
        )
    if len(kinds) < 2:
        return collator
    return WithImage(collator, min((row for row in rows if row.images), key=lambda row: len(row.images)))


class WithImage:
    """Adds to a batch without images the text of `row`, with blank images and without its answers."""

    def __init__(self, collator: Collator, row: Row) -> None:
        self.collator = collator
        encoded = collator.encoder.encode(row.messages, [Image.new("RGB", _BLANK) for _ in row.images])
        # all -100: neither in the loss nor among the tokens it is divided by
        self.extra = replace(encoded, answer_mask=encoded.answer_mask.new_zeros(encoded.answer_mask.shape))

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The batch of `rows`; [B + 1, T] where none has an image."""
        samples = [self.collator.encode(row) for row in rows]
        if not any(row.images for row in rows):
            samples.append(self.extra)
        return collate(samples, self.collator.pad_token_id)
