"""`vfl-train select`: score a pool, sort it by function, write the best part of it in its own format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from vfl_train.data.images import open_image
from vfl_train.data.readers import Dataset, read_dataset, write_quarantine, write_selected
from vfl_train.data.rows import Reason, Rejected, Row
from vfl_train.data_select import choose
from vfl_train.data_select.scoring import Scorer, Scores
from vfl_train.errors import ConfigError, DataError
from vfl_train.hub.load import profile_file
from vfl_train.models import VisionLanguageModel
from vfl_train.models.digest import model_digest
from vfl_train.options import budget_rows, parse_weights
from vfl_train.report.pages import page, percent, tiles
from vfl_train.runs import RunFolder, file_sha256, fingerprint
from vfl_train.schemas import LANGUAGE, Profile, read_json, score_columns

if TYPE_CHECKING:
    from vfl_train.config import SelectConfig

SHOWN = 12  # rows of a kind in the report


def select(config: SelectConfig) -> dict[str, Any]:
    """Run the selection of `config`; returns what selection.json holds. Raises ConfigError, DataError."""
    source = profile_file(config.profile)
    profile = Profile.load(source)
    layers = function_layers(profile, config)
    wanted = list(config.functions) or list(layers)
    dataset = read_dataset(config.data, config.image_root, limit=config.limit)
    if not dataset.rows:
        raise DataError(f"{config.data} holds no usable row", "`vfl-train data check` says why")
    if config.dry_run:
        n = len(dataset.rows)
        print(f"{n} rows, {len(layers) + 2} forwards each; budget {budget_rows(config.budget, n)} rows")
        return {}
    inputs = {"profile": file_sha256(source), "data": dataset.sha256}
    vlm = None
    if config.from_scores is None:
        vlm = _load_model(config, profile)
        inputs["model"] = model_digest(vlm)
    else:
        inputs["from_scores"] = file_sha256(_scores_file(config.from_scores))
    with RunFolder.open(
        config.output, fingerprint("select", config, inputs, ("torch", "transformers")), config.overwrite
    ) as run:
        if run.already_done:
            print(f"already done: {run.folder}")
            return {}
        scored, rejected = _scores(config, vlm, layers, dataset)
        result = choose_rows(config, scored, wanted, list(layers))
        record = _record(config, dataset, layers, scored, rejected, result)
        with run.replacing("scores.parquet") as path:
            pq.write_table(score_table(scored, result, list(layers)), path)
        selected = "selected" + Path(config.data).suffix
        with run.replacing(selected) as path:
            write_selected(dataset, [scored[i].row for i in result["chosen"]], path)
        with run.replacing("quarantine.jsonl") as path:
            write_quarantine(rejected, path)
        record["selected"] = selected
        run.write_json("selection.json", record)
        run.write_text("report.html", report(config, scored, result, record, rejected))
    _say(record)
    return record


def function_layers(profile: Profile, config: SelectConfig) -> dict[str, list[int]]:
    """The layers of every function the profile could measure (all are scored, whatever is wanted: a row's
    bucket is a comparison). Raises ConfigError for a wanted function that has none."""
    mix = parse_weights(config.mix, "--mix") if config.mix else {}
    for name in (*config.functions, *mix):
        profile.layers_of(name, config.layer_rule)
    layers = {}
    for name, f in profile.functions.items():
        found = f.flip_block if config.layer_rule == "block" else f.layers
        if f.status == "ok" and found:
            layers[name] = list(found)
    if not layers:
        raise ConfigError(f"{config.profile} found layers for no function", "profile with more pairs")
    return layers


def _load_model(config: SelectConfig, profile: Profile) -> VisionLanguageModel:
    """The model of `config`. Raises ConfigError if `profile` is of a model of another kind."""
    vlm = VisionLanguageModel.load(
        config.model, config.revision, config.dtype, config.device, config.load_in_4bit, config.max_pixels
    )
    for warning in profile.check_model(vlm.info):
        Console(stderr=True).print(f"warning: {warning}", markup=False)
    return vlm


def _scores(
    config: SelectConfig, vlm: VisionLanguageModel | None, layers: dict[str, list[int]], dataset: Dataset
) -> tuple[list[Scores], list[Rejected]]:
    """Scores of the rows that can be scored and everything that was quarantined, both in input order."""
    if config.from_scores is not None:
        scored, rejected = _read_scores(config.from_scores, config.ablation, layers, dataset)
    else:
        assert vlm is not None
        scorer = Scorer(vlm, layers, config.ablation, batch_tokens=config.batch_tokens)
        scored, rejected = scorer.score(dataset.rows), scorer.rejected
        for reason, count in scorer.cost.reasons.items():
            print(f"{count} of {scorer.cost.rows} forwards ran on the reference path: {reason}")
    if not scored:
        raise DataError("no row of the pool can be encoded by this model", "see `vfl-train data preview`")
    return scored, sorted([*dataset.rejected, *rejected], key=lambda r: r.row)


def _scores_file(folder: Path) -> Path:
    path = folder / "scores.parquet"
    if not path.is_file():
        raise ConfigError(f"{folder} holds no scores.parquet", "give the output folder of an earlier select")
    return path


def _read_scores(
    folder: Path, ablation: str, layers: dict[str, list[int]], dataset: Dataset
) -> tuple[list[Scores], list[Rejected]]:
    """Scores of an earlier run over the same data, and the rows which that run could not score. Raises
    ConfigError if it was of other rows, other layers or another ablation."""
    earlier, fix = read_json(folder / "selection.json"), "score this data with this profile again"
    for key, wanted in (("layers", layers), ("ablation", ablation)):
        if earlier.get(key) != wanted:
            raise ConfigError(f"{folder} was scored with {key} {earlier.get(key)}, not {wanted}", fix)
    try:
        table = pq.read_table(_scores_file(folder)).to_pylist()
    except pa.ArrowInvalid as e:
        raise ConfigError(f"{folder}/scores.parquet cannot be read: {e}", fix) from e
    rows = {row.uid: row for row in dataset.rows}
    if any(t["uid"] not in rows for t in table):
        raise ConfigError(f"{folder}/scores.parquet has rows that the data does not have", fix)
    lines = (folder / "quarantine.jsonl").read_text(encoding="ascii").splitlines()
    refused = {entry["row"]: entry for entry in map(json.loads, lines)}
    rejected = []
    for uid in rows.keys() - {t["uid"] for t in table}:
        row, entry = rows[uid], refused.get(rows[uid].row)
        if entry is None:
            raise ConfigError(f"{folder}/scores.parquet has no score of row {row.row}", fix)
        rejected.append(Rejected(row.row, row.id, Reason(entry["code"]), entry["detail"], row.line))
    scored = [
        Scores(
            rows[t["uid"]], t["n_answer_tokens"], t["loss_full"], {f: t[f"loss_{f}"] for f in layers},
            {f: t[f"delta_{f}"] for f in layers}, t["visual_gain"], tuple(t["flags"]),
        )
        for t in table
    ]  # fmt: skip
    return scored, rejected


def choose_rows(
    config: SelectConfig, scored: Sequence[Scores], wanted: list[str], functions: list[str]
) -> dict[str, Any]:
    """Bucket and score of every row and the positions of the chosen ones."""
    deltas = {f: [s.deltas[f] for s in scored] for f in functions}
    gain = [s.visual_gain for s in scored]
    loss = [s.loss_full for s in scored]
    bucket = choose.buckets(deltas)
    mix = parse_weights(config.mix, "--mix") if config.mix else None
    budget = min(budget_rows(config.budget, len(scored)), len(scored))
    picks: dict[str, list[int]] = {}
    ranked: dict[str, np.ndarray] = {}
    for method in ("vfl", "random", "loss", "visual-gain"):
        ranked[method] = choose.scores(method, bucket, deltas, loss, gain, config.seed)
        if method == "vfl":
            picks[method] = choose.pick(budget, bucket, ranked[method], wanted, mix, config.fill)
        else:  # the baselines know no buckets
            picks[method] = choose.pick(budget, ["all"] * len(scored), ranked[method], ["all"])
    chosen = picks[config.method]
    overlaps = {m: choose.overlap(chosen, p) for m, p in picks.items() if m != config.method}
    return {
        "bucket": bucket, "score": ranked[config.method], "chosen": chosen, "budget": budget,
        "overlap": overlaps,
    }  # fmt: skip


def score_table(scored: Sequence[Scores], result: dict[str, Any], functions: list[str]) -> pa.Table:
    """scores.parquet by contract."""
    chosen = set(result["chosen"])
    columns: dict[str, Any] = {
        "uid": [s.row.uid for s in scored],
        "row": pa.array([s.row.row for s in scored], pa.int64()),
        "source": [s.row.source for s in scored],
        "n_answer_tokens": pa.array([s.n_answer_tokens for s in scored], pa.int32()),
        "loss_full": [s.loss_full for s in scored],
        "visual_gain": [s.visual_gain for s in scored],
        "bucket": result["bucket"],
        "score": pa.array([float(x) for x in result["score"]], pa.float64()),
        "flags": pa.array([list(s.flags) for s in scored], pa.list_(pa.string())),
        "selected": [i in chosen for i in range(len(scored))],
    }
    for f in functions:
        columns[f"loss_{f}"] = [s.losses[f] for s in scored]
        columns[f"delta_{f}"] = [s.deltas[f] for s in scored]
    return pa.table({name: columns[name] for name in score_columns(tuple(functions))})


def _record(
    config: SelectConfig,
    dataset: Dataset,
    layers: dict[str, list[int]],
    scored: Sequence[Scores],
    rejected: Sequence[Rejected],
    result: dict[str, Any],
) -> dict[str, Any]:
    """selection.json: what was asked, what came out, and what is needed to repeat it."""
    picked = Counter(result["bucket"][i] for i in result["chosen"])
    return {
        "schema_version": 1,
        "model": config.model, "method": config.method, "ablation": config.ablation,
        "reference": "previous level" if config.ablation == "nested" else "full model",
        "functions": list(config.functions) or list(layers), "layers": layers,
        "layer_rule": config.layer_rule,
        "data": {"format": dataset.format, "sha256": dataset.sha256, "rows_read": dataset.n_read},
        "rows_kept": len(scored), "rows_quarantined": len(rejected),
        "quarantine": dict(sorted(Counter(str(r.code) for r in rejected).items())),
        "budget": {"asked": config.budget, "rows": result["budget"], "filled": config.fill},
        "rows_selected": len(result["chosen"]),
        "buckets": {
            name: {"rows": n, "selected": picked.get(name, 0)}
            for name, n in sorted(Counter(result["bucket"]).items())
        },
        "overlap": result["overlap"], "seed": config.seed,
    }  # fmt: skip


def bucket_rows(record: dict[str, Any]) -> list[dict[str, str]]:
    """The bucket table of a report."""
    kept, taken = record["rows_kept"], max(1, record["rows_selected"])
    return [
        {"name": name, "rows": str(b["rows"]), "share": percent(b["rows"] / kept),
         "picked": str(b["selected"]), "picked_share": percent(b["selected"] / taken)}
        for name, b in record["buckets"].items()
    ]  # fmt: skip


def examples(scored: Sequence[Scores], result: dict[str, Any], best: bool) -> list[dict[str, str]]:
    """Thumbnails of picked rows (best first) or of an even sample of those left out."""
    chosen = set(result["chosen"])
    if best:
        order = sorted(chosen, key=lambda i: (-result["score"][i], i))[:SHOWN]
    else:
        out = [i for i in range(len(scored)) if i not in chosen]
        order = out[:: max(1, len(out) // SHOWN)][:SHOWN]
    shown = []
    for i in order:
        s, bucket = scored[i], result["bucket"][i]
        value = "" if bucket == LANGUAGE else f", {s.deltas[bucket]:+.2f} nats"
        shown.append((first_image(s.row), *first_turn(s.row), f"{bucket}{value}"))
    return tiles(shown)


def first_image(row: Row) -> Any:
    """The first picture of a row, None for a text-only one."""
    return open_image(row.images[0]) if row.images else None


def first_turn(row: Row) -> tuple[str, str]:
    """Question and answer that stand for a row in a report."""
    question = next((m.text for m in row.messages if m.role == "user"), "")
    answer = next((m.text for m in row.messages if m.role == "assistant"), "")
    return question.strip(), answer.strip()


def report(
    config: SelectConfig,
    scored: Sequence[Scores],
    result: dict[str, Any],
    record: dict[str, Any],
    rejected: Sequence[Rejected],
) -> str:
    """report.html of a selection."""
    facts = [
        (str(record["rows_selected"]), f"rows picked of {record['rows_kept']}"),
        (config.method, f"method, ablation {config.ablation}"),
        *((percent(share), f"overlap with {name}") for name, share in record["overlap"].items()),
    ]
    lead = f"Rows that train {', '.join(record['functions'])}, scored by {config.model}."
    return page(
        "select.html", "VFL-Select", lead, facts=facts, buckets=bucket_rows(record),
        picked=examples(scored, result, best=True), rejected=examples(scored, result, best=False),
        quarantine=sorted(Counter(str(r.code) for r in rejected).items()),
    )  # fmt: skip


def _say(record: dict[str, Any]) -> None:
    kept, taken, budget = record["rows_kept"], record["rows_selected"], record["budget"]["rows"]
    print(f"{record['data']['rows_read']} read = {kept} kept + {record['rows_quarantined']} quarantined")
    print(
        f"{taken} rows picked of {kept}: "
        + ", ".join(f"{n} {b['selected']}" for n, b in record["buckets"].items())
    )
    if taken < budget:
        print(f"the wanted buckets hold only {taken} of the {budget} rows of the budget; --fill completes it")
