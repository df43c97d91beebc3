"""report.html of a selection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vfl_train.data.images import RejectedImage, open_image
from vfl_train.data.rows import Rejected, Row
from vfl_train.data_select import flags
from vfl_train.data_select.plots import distribution_bytes, largest_sources
from vfl_train.data_select.rank import Selection
from vfl_train.report.pages import data_uri, page, percent, tiles
from vfl_train.schemas import LANGUAGE

if TYPE_CHECKING:
    from vfl_train.config import SelectConfig
    from vfl_train.data.pool import Pool

SHOWN = 12  # rows of a kind
SCORE = {
    "vfl": "score: how far the layers of the row's bucket move its answer's log-odds",
    "loss": "score: loss, nats per answer token",
    "visual-gain": "score: visual gain, nats per answer token",
    "random": "score: drawn by lot",
}
FLAGS = {
    "text_only": "no image",
    flags.SUSPICIOUS: "label doubted: ranked last",
    flags.NEAR_DUPLICATE: "says the same about the same picture as an earlier row: left out",
}


def report(
    config: SelectConfig,
    pool: Pool,
    selection: Selection,
    record: dict[str, Any],
    rejected: Sequence[Rejected],
) -> str:
    """The page: figures, buckets, distributions, examples, flags, quarantine."""
    doubted = flags.flagged(selection.table["flags"], flags.SUSPICIOUS)
    facts = [
        (str(record["rows_selected"]), f"rows picked of {record['rows_kept']}"),
        (config.method, f"method, ablation {config.ablation}, buckets by {record['bucket_rule']}"),
        *((percent(share), f"overlap with {name}") for name, share in record["overlap"].items()),
    ]
    lead = f"Rows that train {', '.join(record['functions'])}, scored by {record['model']}."
    names = [name for name in (*record["layers"], LANGUAGE) if name in record["buckets"]]
    what = SCORE[config.method]
    return page(
        "select.html", "VFL-Select", lead, facts=facts, buckets=bucket_rows(record),
        by_function=data_uri(distribution_bytes(selection, "bucket", names, what)),
        by_source=data_uri(distribution_bytes(selection, "source", largest_sources(selection), what)),
        picked=_examples(pool, selection, _best(selection)),
        rejected=_examples(pool, selection, _sample(~selection.column("selected").astype(bool) & ~doubted)),
        doubted=_examples(pool, selection, _sample(doubted)),
        flags=[(name, FLAGS.get(name, ""), n) for name, n in record["flags"].items()],
        quarantine=sorted(Counter(str(r.code) for r in rejected).items()),
    )  # fmt: skip


def bucket_rows(record: dict[str, Any]) -> list[dict[str, str]]:
    """The bucket table of a report."""
    kept, taken = record["rows_kept"], max(1, record["rows_selected"])
    return [
        {"name": name, "rows": str(b["rows"]), "share": percent(b["rows"] / kept),
         "picked": str(b["selected"]), "picked_share": percent(b["selected"] / taken)}
        for name, b in record["buckets"].items()
    ]  # fmt: skip


def first_image(row: Row) -> Any:
    """The first picture of a row, None for a text-only one."""
    return open_image(row.pictures[0]) if row.pictures else None


def first_turn(row: Row) -> tuple[str, str]:
    """Question and answer that stand for a row in a report."""
    question = next((m.text for m in row.messages if m.role == "user"), "")
    answer = next((m.text for m in row.messages if m.role == "assistant"), "")
    return question.strip(), answer.strip()


def _best(selection: Selection) -> np.ndarray:
    """The best picked rows, in turn from each bucket."""
    chosen = selection.chosen
    order = chosen[np.argsort(-selection.column("score")[chosen], kind="stable")]
    bucket = selection.column("bucket")[order]
    place = np.zeros(len(order), dtype=np.int64)
    for name in np.unique(bucket.astype(str)):
        place[bucket == name] = np.arange((bucket == name).sum())
    return order[np.argsort(place, kind="stable")][:SHOWN]


def _sample(which: np.ndarray) -> np.ndarray:
    """An even sample of rows."""
    out = np.flatnonzero(which)
    return out[:: max(1, len(out) // SHOWN)][:SHOWN]


def _examples(pool: Pool, selection: Selection, positions: np.ndarray) -> list[dict[str, str]]:
    """Tiles of rows; one whose image has gone since is left out."""
    table = selection.table.take(positions).to_pylist()
    shown = []
    for t in table:
        row = pool.row(t["row"])
        if isinstance(row, Rejected):
            continue
        bucket = t["bucket"]
        moved = "" if bucket == LANGUAGE else f", {t[f'delta_{bucket}']:+.2f} nats"
        try:
            shown.append((first_image(row), *first_turn(row), f"{bucket}{moved}, loss {t['loss_full']:.2f}"))
        except RejectedImage:
            continue
    return tiles(shown)
