"""`vfl-train data check` and `data preview`: what is in a data file, and what would be trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from vfl_train.data.readers import Dataset, read_dataset
from vfl_train.data.rows import Row, RowError, one_line
from vfl_train.errors import DataError

if TYPE_CHECKING:
    from vfl_train.config import DataConfig
    from vfl_train.data.collator import Encoded, Encoder

PREVIEW_ROWS = 3
EXAMPLES = 3  # rows shown per reason code
OPEN, CLOSE = "\u27e6", "\u27e7"  # around supervised tokens, for terminals and files without colour


def check(config: DataConfig) -> Dataset:
    """Read `config.data`, decode every image, and print counts by reason code and statistics.

    Raises:
        ConfigError: no such file, or not a supported format.
        DataError: no row is usable.
    """
    dataset = read_dataset(config.data, config.image_root, check_images=True, limit=config.limit)
    console = Console(highlight=False, soft_wrap=True)
    for line in report(dataset):
        console.print(line, markup=False)
    if not dataset.rows:
        raise _nothing_usable(dataset)
    return dataset


def report(dataset: Dataset) -> list[str]:
    """The lines that `check` prints: the same for the same file, wherever it lies."""
    lines = [f"{dataset.path.name}: {dataset.format}, sha256 {dataset.sha256[:16]}"]
    lines.append(dataset.totals())
    for code, count in dataset.counts().items():
        lines.append(f"  {code:<22}{count:>8}")
        examples = [entry for entry in dataset.rejected if entry.code == code]
        lines += [f"      line {e.line}, id {e.id}: {e.detail}" for e in examples[:EXAMPLES]]
    if dataset.rows:
        lines += _statistics(dataset.rows)
    return lines


def preview(config: DataConfig) -> None:
    """Print the first usable rows as `config.model` will see them, the supervised tokens marked.

    Raises:
        ConfigError: no such file, format or model.
        DataError: no row is usable, or the model's processor cannot give an answer mask.
    """
    from vfl_train.data.collator import Collator, Encoder
    from vfl_train.models import load_processor

    limit = config.limit or PREVIEW_ROWS
    dataset = read_dataset(config.data, config.image_root, check_images=False)
    if not dataset.rows:
        raise _nothing_usable(dataset)
    options = {key: getattr(config, key, None) for key in ("revision", "max_pixels")}
    encoder = Encoder(load_processor(getattr(config, "model", None) or "phantom", **options))
    collator = Collator(encoder)
    console = Console(highlight=False)
    console.print(Text(f"{dataset.format}, {dataset.summary()}; tokens trained on are {OPEN}marked{CLOSE}"))
    for row in dataset.rows[:limit]:
        console.print(_title(row), style="bold", markup=False)
        try:
            encoded = collator.encode(row)
        except RowError as error:
            console.print(Text(error.message, style="red"))
            continue
        console.print(marked_tokens(encoder, encoded))


def marked_tokens(encoder: Encoder, encoded: Encoded) -> Text:
    """The sample as text: supervised tokens marked, a run of image tokens as one `<image x N>`."""
    ids, mask = encoded.inputs["input_ids"][0].tolist(), encoded.answer_mask.tolist()
    kinds = ["answer" if supervised else "text" for supervised in mask]
    kinds = ["image" if i in encoder.placeholder_ids else kind for i, kind in zip(ids, kinds, strict=True)]
    text = Text()
    for kind, run in _runs(kinds, ids):
        if kind == "image":
            text.append(f"<image x {len(run)}>", style="dim")
            continue
        words = encoder.tokenizer.decode(run, skip_special_tokens=False)
        if kind == "answer":
            text.append(f"{OPEN}{words}{CLOSE}", style="bold green")
        else:
            text.append(words)
    return text.append(f"  ({encoded.n_answer_tokens} of {encoded.length} tokens supervised)", style="dim")


def _runs(kinds: Sequence[str], ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Neighbouring ids of the same kind, together."""
    runs: list[tuple[str, list[int]]] = []
    for kind, token in zip(kinds, ids, strict=True):
        if runs and runs[-1][0] == kind:
            runs[-1][1].append(token)
        else:
            runs.append((kind, [token]))
    return runs


def _statistics(rows: Sequence[Row]) -> list[str]:
    """Images and answers of the kept rows, in counts and characters."""
    images = Counter(len(row.images) for row in rows)
    answers = [m.text for row in rows for m in row.messages if m.role == "assistant"]
    sizes = [len(answer) for answer in answers]
    sources = Counter(row.source for row in rows)
    ids = Counter(row.id for row in rows)
    repeated = sum(count for count in ids.values() if count > 1)
    return [
        "images per row: " + ", ".join(f"{n} in {images[n]} rows" for n in sorted(images)),
        f"answers: {len(answers)} ({len(answers) / len(rows):.2f} a row, {len(set(answers))} different), "
        f"characters median {median(sizes):g}, longest {max(sizes)}",
        "sources: " + ", ".join(f"{one_line(name, 60)} {n}" for name, n in _largest(sources)),
        f"rows that share their id: {repeated}",
    ]


def _largest(counts: Counter, limit: int = 10) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]


def _title(row: Row) -> str:
    return f"\nrow {row.row} (line {row.line}), id {row.id}, source {row.source}, {len(row.images)} images"


def _nothing_usable(dataset: Dataset) -> DataError:
    first = dataset.rejected[0]
    message = f"{dataset.path}: none of {dataset.n_read} rows is usable; row {first.row}: {first.detail}"
    return DataError(message, "repair the rows, or check --image-root")
