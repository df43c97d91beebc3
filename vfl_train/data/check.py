"""`vfl-train data check` and `data preview`: what is in a data set, and what would be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from vfl_train.data.pool import Pool, open_pool
from vfl_train.data.readers import write_quarantine
from vfl_train.data.rows import Rejected, Row, RowError, one_line
from vfl_train.data.survey import FLAGS, Survey, largest, spread
from vfl_train.errors import DataError
from vfl_train.progress import track

if TYPE_CHECKING:
    from vfl_train.config import DataConfig
    from vfl_train.data.collator import Collator, Encoded, Encoder

PREVIEW_ROWS = 3
EXAMPLES = 3  # rows shown per reason code
OPEN, CLOSE = "\u27e6", "\u27e7"  # around supervised tokens, for terminals and files without colour


def check(config: DataConfig) -> Survey:
    """Read `config.data`, decode every image, and print counts by reason code and statistics.

    With `max_length` every row is also encoded by the model's processor. With `output`, quarantine.jsonl and
    report.json are written there.

    Raises:
        ConfigError: no such file, or not a supported format.
        DataError: no row is usable, or with `strict`, one is not.
    """
    pool = open_pool(config.data, config.image_root)
    encoder = None if config.max_length is None else _collator(config).encoder
    entries = pool.iterate(0, config.limit, check_images=True)
    survey = Survey(pool, encoder, config.max_length).run(track(entries, None, "rows"))
    console = Console(highlight=False, soft_wrap=True)
    for line in report(survey):
        console.print(line, markup=False)
    if config.output is not None:
        _write(config, survey)
    if not survey.n_kept:
        raise _nothing_usable(pool, survey)
    if config.strict and survey.rejected:
        first = survey.rejected[0]
        message = f"{pool.path}: {len(survey.rejected)} of {survey.n_read} rows are not usable"
        raise DataError(
            f"{message}; row {first.row}: {first.detail}", "repair or remove them, or no --strict"
        )
    return survey


def report(survey: Survey) -> list[str]:
    """The lines that `check` prints: the same for the same data, wherever it lies."""
    pool = survey.pool
    lines = [f"{pool.path.name}: {pool.format}, sha256 {pool.sha256[:16]}", survey.totals()]
    for code, count in survey.counts().items():
        lines.append(f"  {code:<22}{count:>8}")
        examples = [entry for entry in survey.rejected if entry.code == code]
        lines += [f"      {_where(e)}, id {e.id}: {e.detail}" for e in examples[:EXAMPLES]]
    if survey.n_kept:
        lines += _statistics(survey)
    for name, flag in survey.findings().items():
        lines.append(f"  {name:<22}{flag.count:>8}  {FLAGS[name]}")
        lines += [f"      {example}" for example in flag.examples]
    return lines


def preview(config: DataConfig) -> None:
    """Print the first usable rows as `config.model` will see them, the supervised tokens marked.

    Raises:
        ConfigError: no such file, format or model.
        DataError: no row is usable, or the model's processor cannot give an answer mask.
    """
    pool = open_pool(config.data, config.image_root)
    refused: list[Rejected] = []
    rows: list[Row] = []
    for entry in pool.iterate():
        if isinstance(entry, Row):
            rows.append(entry)
        else:
            refused.append(entry)
        if len(rows) == (config.limit or PREVIEW_ROWS):
            break
    if not rows:
        raise _none_usable(pool, len(refused), refused[0])
    collator = _collator(config)
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"{pool.format}; tokens trained on are {OPEN}marked{CLOSE}"))
    if refused:
        codes = sorted({str(entry.code) for entry in refused})
        console.print(Text(f"{len(refused)} rows before the last one shown are refused ({', '.join(codes)})"))
    for row in rows:
        console.print(_title(row), style="bold", markup=False)
        try:
            encoded = collator.encode(row)
        except RowError as error:
            console.print(Text(error.message, style="red"))
            continue
        images, videos = iter(row.images), iter(row.videos)
        for place in encoded.places:
            ref = next(videos)[0] if place.frames else next(images)
            size = f"{place.size[0]} x {place.size[1]} pixels, {place.stop - place.start} tokens"
            frames = f" and on, {place.frames} frames" if place.frames else ""
            console.print(Text(f"  {one_line(ref.label)}{frames}: {size}", style="dim"))
        console.print(marked_tokens(collator.encoder, encoded))


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


def _collator(config: DataConfig) -> Collator:
    from vfl_train.data.collator import Collator, Encoder
    from vfl_train.models import load_processor

    options = {key: getattr(config, key, None) for key in ("revision", "max_pixels")}
    return Collator(Encoder(load_processor(config.model, **options)))


def _write(config: DataConfig, survey: Survey) -> None:
    from vfl_train.runs import RunFolder, fingerprint

    assert config.output is not None
    wanted = fingerprint("data", config, {"data": survey.pool.sha256})
    with RunFolder.open(config.output, wanted, config.overwrite) as run:
        if not run.already_done:
            write_quarantine(survey.rejected, run.path("quarantine.jsonl"))
            run.write_json("report.json", survey.as_dict())


def _statistics(survey: Survey) -> list[str]:
    """Images and answers of the kept rows, in counts and characters."""
    images, answers = survey.images_a_row, survey.as_dict()["answers"]
    shape = spread(survey.answer_lengths)
    filmed = sum(videos * rows for videos, rows in survey.videos_a_row.items())
    assert shape is not None
    lines = [
        "images per row: " + ", ".join(f"{n} in {images[n]} rows" for n in sorted(images)),
        *([f"videos: {filmed}"] if filmed else []),
        f"answers: {answers['count']} ({answers['count'] / survey.n_kept:.2f} a row, "
        f"{answers['different']} different), characters median {shape['median']}, longest {shape['longest']}",
        "sources: " + ", ".join(f"{one_line(name, 60)} {n}" for name, n in largest(survey.sources)),
    ]
    if tokens := spread(survey.token_lengths):
        lines.append(f"tokens: median {tokens['median']}, longest {tokens['longest']}")
    if survey.boxes.boxes:
        kind = survey.boxes.kind or "coordinates that cannot be told"
        lines.append(f"boxes: {survey.boxes.boxes}, taken as {kind}")
    return lines


def _where(entry: Row | Rejected) -> str:
    return f"row {entry.row}" if entry.line is None else f"line {entry.line}"


def _title(row: Row) -> str:
    where = "" if row.line is None else f" (line {row.line})"
    turns = sum(message.role == "assistant" for message in row.messages)
    images = f"{len(row.images)} image{'' if len(row.images) == 1 else 's'}"
    videos = f", {len(row.videos)} video{'s' if len(row.videos) > 1 else ''}" if row.videos else ""
    counts = f"{images}{videos}, {turns} answer{'s' if turns > 1 else ''}"
    return f"\nrow {row.row}{where}, id {row.id}, source {row.source}, {counts}"


def _nothing_usable(pool: Pool, survey: Survey) -> DataError:
    return _none_usable(pool, survey.n_read, survey.rejected[0])


def _none_usable(pool: Pool, read: int, first: Rejected) -> DataError:
    message = f"{pool.path}: none of {read} rows is usable; row {first.row}: {first.detail}"
    return DataError(message, "repair the rows, or check --image-root")
