"""`vfl-train select`: score a pool, sort it by function, write the best part of it in its own format.

Scoring and ranking are two steps: the first writes shards (`shards`), in as many processes as torchrun
started; the second works on columns of numbers, in the first process alone, and is all that --from-scores
does.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console

from vfl_train.data.pool import Pool, open_pool
from vfl_train.data.readers import write_quarantine
from vfl_train.data.rows import Reason, Rejected
from vfl_train.data_select import flags
from vfl_train.data_select.estimate import WORTH_IT, estimate
from vfl_train.data_select.rank import Selection, rank, with_duplicates
from vfl_train.data_select.report import bucket_rows, first_image, first_turn, report
from vfl_train.data_select.scoring import Scorer
from vfl_train.data_select.shards import (
    Scored,
    base_key,
    code_digest,
    processor_digest,
    read_probes,
    read_shards,
    score_probes,
    score_shards,
)
from vfl_train.data_select.signature import PAIRS, overlapping, probe_rows
from vfl_train.errors import ConfigError, DataError
from vfl_train.functions.builtin.canvas import SIZE
from vfl_train.functions.probes import ProbeSet, builtin_probe_set, load_probe_set
from vfl_train.hub.load import profile_file
from vfl_train.models import VisionLanguageModel
from vfl_train.models.digest import model_digest
from vfl_train.options import budget_rows, parse_weights
from vfl_train.runs import SHARDS, RunFolder, file_sha256, fingerprint
from vfl_train.schemas import BUILTIN_FUNCTIONS, Profile, read_json, score_columns
from vfl_train.training.distributed import device_of, exchange, open_run, session, world
from vfl_train.training.launch import relaunch

if TYPE_CHECKING:
    from vfl_train.config import SelectConfig

__all__ = ["bucket_rows", "first_image", "first_turn", "function_layers", "select"]

PATIENCE = 30 * 24 * 3600  # seconds that a process which has scored its rows waits for the others
PACKAGES = ("torch", "transformers")
PROBES = "probes.parquet"  # scores of the probes that signatures are learned from
_UNREADABLE = (Reason.placeholder_in_text, Reason.not_encodable)  # only this model's processor objects
log = logging.getLogger(__name__)


def select(config: SelectConfig) -> dict[str, Any]:
    """Run the selection of `config`; returns what selection.json holds (nothing in processes that torchrun
    started beside the first, and where the work was done before).

    Raises:
        ConfigError, DataError, NumericError, DiskError; DistributedError if a process is lost.
    """
    if config.from_scores is None and not config.dry_run and relaunch(config):
        return dict(read_json(config.output / "selection.json"))
    with session(config.device, PATIENCE):
        return _select(config)


def _select(config: SelectConfig) -> dict[str, Any]:
    source = profile_file(config.profile)
    profile = Profile.load(source)
    layers = function_layers(profile, config)
    pool = open_pool(config.data, config.image_root)
    rows = len(pool) if config.limit is None else min(len(pool), config.limit)
    rule = bucket_rule(config, layers)
    inputs, scorer, probes = {"profile": file_sha256(source), "data": pool.sha256}, None, None
    base = ""
    if config.from_scores is None:
        vlm = _load_model(config, profile)
        scorer = Scorer(
            vlm, layers, config.ablation, batch_tokens=config.batch_tokens, by_layer=rule == "signature"
        )
        if scorer.by_layer:
            probes = _probes(config, vlm, list(layers))
            inputs["probe_set"] = probes.sha256
        inputs |= _scoring_inputs(scorer)
        versions = {name: metadata.version(name) for name in PACKAGES}
        facts = {"data": "", "layers": layers, "ablation": config.ablation, "by_layer": scorer.by_layer}
        base = base_key({**inputs, **facts, **versions})
        _say_cost(config, pool, rows, scorer)
    else:
        inputs["from_scores"] = file_sha256(_scores_file(config.from_scores))
    if config.dry_run:
        return {}
    with open_run(config.output, fingerprint("select", config, inputs, PACKAGES), config.overwrite) as run:
        if run.already_done:
            _print(f"already done: {run.folder}")
            return {}
        if scorer is not None:
            folder, here, names = config.output / SHARDS, world(), list(layers)
            if probes is not None and here.is_main:
                score_probes(probe_rows(probes, names), scorer, names, folder / PROBES, base)
            score_shards(pool, rows, scorer, names, folder, base, here.rank, here.size)
            exchange(None, "the scores")
        if not world().is_main:
            return {}
        if scorer is not None:
            scored = with_duplicates(read_shards(folder, rows, names, scorer.by_layer))
            like = read_probes(folder / PROBES) if scorer.by_layer else None
            model = config.model
        else:
            scored, like, model = _read_scores(config, layers, pool, rows, rule)
        return _finish(config, run, _Facts(pool, rows, layers, model, rule, like), scored)


@dataclass(frozen=True)
class _Facts:
    """What is selected from: the first `rows` rows of `pool`, by these functions' layers, as `model` scored
    them; sorted by `rule`, for `signature` by likeness to the scored `probes`."""

    pool: Pool
    rows: int
    layers: dict[str, list[int]]
    model: str
    rule: str
    probes: pa.Table | None


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


def bucket_rule(config: SelectConfig, layers: dict[str, list[int]]) -> str:
    """`need` or `signature`; what `auto` means for functions with these `layers`."""
    if config.bucket_rule != "auto":
        return config.bucket_rule
    if config.method != "vfl" or not overlapping(layers):
        return "need"
    unknown = [name for name in layers if name not in BUILTIN_FUNCTIONS]
    if unknown and config.probes is None:
        log.warning("functions share layers; give --probes with pairs of %s to tell their rows", unknown[0])
        return "need"
    return "signature"


# --- scores ----------------------------------------------------------------------------------------


def _load_model(config: SelectConfig, profile: Profile) -> VisionLanguageModel:
    """The model of `config`. Raises ConfigError if `profile` is of a model of another kind."""
    vlm = VisionLanguageModel.load(
        config.model, config.revision, config.dtype, device_of(config.device), config.load_in_4bit,
        config.max_pixels, load_in_8bit=config.load_in_8bit,
    )  # fmt: skip
    for warning in profile.check_model(vlm.info):
        if world().is_main:
            Console(stderr=True).print(f"warning: {warning}", markup=False)
    return vlm


def _probes(config: SelectConfig, vlm: VisionLanguageModel, functions: list[str]) -> ProbeSet:
    """The pairs that signatures are learned from. Raises ConfigError, DataError."""
    if config.probes is not None:
        return load_probe_set(config.probes, functions, PAIRS)
    return builtin_probe_set(functions, PAIRS, config.seed, world=vlm.world, box=vlm.box_convention(SIZE))


def _scoring_inputs(scorer: Scorer) -> dict[str, str]:
    """What scores depend on beside the rows: name -> digest."""
    vlm = scorer.vlm
    return {
        "model": model_digest(vlm), "processor": processor_digest(vlm.processor), "code": code_digest(),
        "dtype": vlm.dtype,
    }  # fmt: skip


def _say_cost(config: SelectConfig, pool: Pool, rows: int, scorer: Scorer) -> None:
    """The estimate, where it is asked for or the run is long."""
    if not world().is_main or not (config.dry_run or rows >= WORTH_IT):
        return
    found = estimate(pool, rows, scorer, config.num_processes or world().size)
    print(found.line() if found else f"{rows} rows; none of those looked at can be scored")
    if config.dry_run:
        print(f"budget {min(budget_rows(config.budget, rows), rows)} rows of at most {rows}")


def _scores_file(folder: Path) -> Path:
    path = folder / "scores.parquet"
    if not path.is_file():
        raise ConfigError(f"{folder} holds no scores.parquet", "give the output folder of an earlier select")
    return path


def _read_scores(
    config: SelectConfig, layers: dict[str, list[int]], pool: Pool, rows: int, rule: str
) -> tuple[Scored, pa.Table | None, str]:
    """Scores of an earlier run over the same data, with the rows which that run could not score, those of the
    probes if `rule` needs them, and the name of its model. Raises ConfigError if it was of other rows, other
    layers or another ablation, or lacks what `rule` needs."""
    folder = config.from_scores
    assert folder is not None
    earlier, again = read_json(folder / "selection.json"), "score this data with this profile again"
    data, ablation = earlier.get("data", {}), earlier.get("ablation")
    compared = (
        ("the layers", earlier.get("layers"), layers, again),
        ("ablation", ablation, config.ablation, f"give --ablation {ablation}"),
        ("data of sha256", data.get("sha256"), pool.sha256, "give the --data of that run"),
        ("the first rows", data.get("rows_read"), rows, "give the --limit of that run"),
    )
    for what, theirs, wanted, fix in compared:
        if theirs != wanted:
            raise ConfigError(f"{folder} was scored with {what} {theirs}, not {wanted}", fix)
    by_layer = earlier.get("bucket_rule") == "signature"
    if rule == "signature" and not by_layer:
        raise ConfigError(f"{folder} was scored without signatures", f"{again}, or give --bucket-rule need")
    try:
        like = pq.read_table(folder / PROBES) if rule == "signature" else None
        table = pq.read_table(_scores_file(folder))
        rejected = [_rejected(line) for line in (folder / "quarantine.jsonl").open(encoding="ascii")]
    except (pa.ArrowInvalid, OSError, KeyError, ValueError) as e:
        raise ConfigError(f"the scores in {folder} cannot be read: {e}", again) from e
    if table.column_names != score_columns(tuple(layers), by_layer) or len(table) + len(rejected) != rows:
        raise ConfigError(f"{folder}/scores.parquet is not whole", again)
    path = earlier.get("forwards", {})
    scored = Scored(table, rejected, path.get("all", 0), Counter(path.get("on_reference_path", {})))
    return scored, like, str(earlier.get("model"))


def _rejected(line: str) -> Rejected:
    entry = json.loads(line)
    return Rejected(entry["row"], entry["id"], Reason(entry["code"]), entry["detail"], entry["line"])


# --- what is written -------------------------------------------------------------------------------


def _finish(config: SelectConfig, run: RunFolder, of: _Facts, scored: Scored) -> dict[str, Any]:
    """Rank, write everything, say it. Raises DataError if there is nothing to pick from."""
    if not len(scored.table):
        if any(r.code in _UNREADABLE for r in scored.rejected):
            raise DataError("no row of the pool can be encoded by this model", "see `vfl-train data preview`")
        raise DataError(f"{config.data} holds no usable row", "`vfl-train data check` says why")
    mix = parse_weights(config.mix, "--mix") if config.mix else {}
    wanted = list(config.functions or mix or of.layers)
    selection = rank(config, scored, wanted, list(of.layers), of.probes)
    record = _record(config, of, wanted, scored, selection)
    numbers = selection.column("row")[selection.chosen].tolist()
    with run.replacing("scores.parquet") as path:
        pq.write_table(selection.table, path)
    if of.probes is not None:
        with run.replacing(PROBES) as path:
            pq.write_table(of.probes, path)
    selected = run.path(record["selected"])
    of.pool.write(numbers, selected)
    with run.replacing("quarantine.jsonl") as path:
        write_quarantine(scored.rejected, path)
    if config.emit is not None:
        record["emitted"] = _emit(config.emit, run, of.pool, selection, numbers, record["selected"])
    run.write_json("selection.json", record)
    run.write_text("report.html", report(config, of.pool, selection, record, scored.rejected))
    _say(record)
    return record


def _emit(
    kind: str, run: RunFolder, pool: Pool, selection: Selection, numbers: list[int], selected: str
) -> list[str]:
    """Side files for another trainer; returns their names."""
    from vfl_train.data_select.emit import emit, hint

    bucket = dict(zip(numbers, selection.column("bucket")[selection.chosen].tolist(), strict=True))
    written = emit(kind, pool, numbers, bucket, run.folder, selected)
    print(hint(kind, pool, run.folder))
    return sorted(path.relative_to(run.folder).as_posix() for path in written)


def _record(
    config: SelectConfig, of: _Facts, wanted: list[str], scored: Scored, selection: Selection
) -> dict[str, Any]:
    """selection.json: what was asked, what came out, and what is needed to repeat it."""
    table = selection.table
    picked = _counts(table.take(selection.chosen)["bucket"])
    return {
        "schema_version": 1,
        "model": of.model, "method": config.method, "ablation": config.ablation, "bucket_rule": of.rule,
        "reference": "previous level" if config.ablation == "nested" else "full model",
        "functions": wanted, "layers": of.layers,
        "layer_rule": config.layer_rule,
        "data": {"format": of.pool.format, "sha256": of.pool.sha256, "rows_read": of.rows},
        "rows_kept": len(table), "rows_quarantined": len(scored.rejected),
        "quarantine": dict(sorted(Counter(str(r.code) for r in scored.rejected).items())),
        "forwards": {"all": scored.forwards, "on_reference_path": dict(sorted(scored.reference.items()))},
        "budget": {"asked": config.budget, "rows": selection.budget, "filled": config.fill},
        "mix": config.mix, "cap_per_source": config.cap_per_source,
        "rows_selected": len(selection.chosen),
        "buckets": {
            name: {"rows": n, "selected": picked.get(name, 0)} for name, n in _counts(table["bucket"]).items()
        },
        "flags": flags.counts(table["flags"]),
        "overlap": selection.overlap, "seed": config.seed, "selected": f"selected{of.pool.extension}",
    }  # fmt: skip


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Rows of each text, by name."""
    return dict(sorted((e["values"], e["counts"]) for e in pc.value_counts(column).to_pylist()))


def _say(record: dict[str, Any]) -> None:
    kept, taken, budget = record["rows_kept"], record["rows_selected"], record["budget"]["rows"]
    print(f"{record['data']['rows_read']} read = {kept} kept + {record['rows_quarantined']} quarantined")
    print(
        f"{taken} rows picked of {kept}: "
        + ", ".join(f"{n} {b['selected']}" for n, b in record["buckets"].items())
    )
    forwards = record["forwards"]
    for reason, count in forwards["on_reference_path"].items():
        print(f"{count} of {forwards['all']} forwards ran on the reference path: {reason}")
    if taken < budget:
        print(_fewer(record))


def _fewer(record: dict[str, Any]) -> str:
    """Why fewer rows were picked than the budget allows."""
    taken = f"only {record['rows_selected']} of the {record['budget']['rows']} rows of the budget"
    if record["method"] == "vfl" and not record["budget"]["filled"]:
        held = "the shares of --mix take" if record["mix"] else "the wanted buckets hold"
        return f"{held} {taken}; --fill completes it"
    capped = " and --cap-per-source" if record["cap_per_source"] else ""
    return f"near-duplicates{capped} leave {taken}"


def _print(text: str) -> None:
    if world().is_main:
        print(text)
