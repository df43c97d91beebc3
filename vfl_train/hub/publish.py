"""What `export` adds to a copy before it may be shown: the public names of its base, its card, its picture;
and whole exports of what holds no weights, profiles and selections."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfl_train.errors import ConfigError
from vfl_train.hub.card import (
    PICTURE,
    Published,
    adapter_card,
    knockout_card,
    merged_card,
    renamed_card,
    table_of,
)
from vfl_train.hub.contents import KNOCKOUT_RECORD, MERGE_RECORD, MIGRATION_RECORD
from vfl_train.hub.load import CONFIG, PROFILE
from vfl_train.hub.manifest import read_manifest, verify_manifest
from vfl_train.hub.origin import Origin, front_matter, hub_origin, local_origin
from vfl_train.hub.privacy import public_name, public_values
from vfl_train.hub.push import MARKS, hub_api, push_folder, refuse_secrets
from vfl_train.hub.record_card import profile_card, selection_card
from vfl_train.hub.retry import polite_client
from vfl_train.hub.scorecard_card import Scorecard
from vfl_train.hub.targets import HERE
from vfl_train.runs import MANIFEST, RunFolder, file_sha256, fingerprint
from vfl_train.schemas import ModelInfo, Profile, read_json
from vfl_train.training.plan import LayerPlan

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from vfl_train.config import ExportConfig

SELECTION, SCORES = "selection.json", "scores.parquet"
RECORDS = {"profile": (PROFILE,), "selection": (SELECTION, SCORES)}


def kind_of(folder: Path) -> str | None:
    """adapter, merged, selection or profile, by the files of a vfl-train output; None for anything else."""
    return next((kind for kind, mark in MARKS.items() if (folder / mark).is_file()), None)


@dataclass(frozen=True)
class Publication:
    """Everything about an export that is not a copy. `inputs` belong to the run's fingerprint."""

    kind: str
    public: Published
    private: bool
    api: HfApi | None

    @property
    def inputs(self) -> dict[str, str]:
        """What of it changes the files."""
        origin, card = self.public.origin, self.public.scorecard
        return {
            "base_model": f"{origin.model_id or origin.name}@{origin.revision}",
            "scorecard": card.sha256 if card else "",
        }

    def finish(self, run: RunFolder, source: Path) -> None:
        """Put the base's public name into the JSON files of `run`, and write its card, licence files and
        picture. `source` is the folder it was copied from. Raises ConfigError for a secret in any file."""
        for name, content in self.public.origin.licence_files.items():
            run.write_bytes(name, content)
        _name_base(run, self.public.origin)
        _name_in_commands(run, base_named_in(source, self.kind)[0], self.public)
        if self.public.picture:  # drawn again: the model's name stands in its pixels
            _draw(run)
        run.write_text("README.md", _card(run.folder, source, self.public))
        refuse_secrets(run.folder, sorted(p.name for p in run.folder.iterdir() if not _hidden(p)))

    def push(self, folder: Path) -> None:
        """Upload the finished `folder`, if that was asked for. Raises as `push_folder` does."""
        if self.api is not None and self.public.repo is not None:
            print(push_folder(self.api, folder, self.public.repo, self.kind, self.private))


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


def prepare(config: ExportConfig, kind: str) -> Publication:
    """Check and look up what a publication needs, before anything is written. The network is used with
    --push-to-hub only.

    Raises:
        ConfigError: a base that nobody else can load, a scorecard of other weights.
        HubError: no token, or the Hub refuses or cannot be reached.
    """
    source, repo = Path(config.source), config.push_to_hub
    name, revision = base_named_in(source, kind)
    card = Scorecard.load(config.scorecard, source) if config.scorecard else None
    api = hub_api(repo) if repo and not config.dry_run else None
    if api is not None:
        with polite_client():
            origin = hub_origin(api, name, revision, config.base_model_id)
    else:
        origin = _offline(name, revision, config)
    if kind in RECORDS:  # measurements: the base's licence is of its weights
        origin = replace(origin, licence={}, licence_files={})
    picture = kind != "selection" and (source / PROFILE).is_file()
    return Publication(kind, Published(origin, repo, card, _datasets(source), picture), config.private, api)


def _offline(name: str | None, revision: str | None, config: ExportConfig) -> Origin:
    if config.base_model_id is None:
        return local_origin(name, revision)
    given, _, commit = config.base_model_id.partition("@")
    known = local_origin(name, revision)
    if known.bundled:  # its licence says nothing of another model
        return Origin(given, given, commit or None)
    return Origin(given, given, commit or None, False, known.licence, known.licence_files)


def base_named_in(source: Path, kind: str) -> tuple[str | None, str | None]:
    """(name, revision) of the base model as the folder says it. Raises ConfigError for malformed JSON."""
    if kind == "adapter":
        found = read_json(source / CONFIG)
        name, revision = found.get("base_model_name_or_path"), found.get("revision")
    elif kind == "profile":
        info = Profile.load(source).model
        name, revision = info.name_or_path, info.revision
    elif kind == "selection":
        found = read_json(source / SELECTION)
        name, revision = found.get("model"), found.get("revision")
    else:
        records = [source / r for r in (KNOCKOUT_RECORD, MERGE_RECORD) if (source / r).is_file()]
        found = read_json(records[0]) if records else {}
        name, revision = found.get("base") or found.get("model"), found.get("revision")
    text = [value if isinstance(value, str) else None for value in (name, revision)]
    return text[0], text[1]


def _datasets(source: Path) -> tuple[str, ...]:
    """Hub ids of the training data, as the card of the source has them."""
    card = source / "README.md"
    found = front_matter(card.read_text(encoding="utf-8"))[0].get("datasets") if card.is_file() else None
    return tuple(map(str, found)) if isinstance(found, list) else ()


def _name_base(run: RunFolder, origin: Origin) -> None:
    """The base's public name in every JSON file that names it."""
    name = origin.model_id or origin.name
    if (run.folder / CONFIG).is_file():
        value = read_json(run.folder / CONFIG)
        value.update(base_model_name_or_path=name, revision=origin.revision)
        run.write_text(CONFIG, json.dumps(value, indent=2) + "\n")
    for file in ("plan.json", PROFILE):
        if (run.folder / file).is_file():
            value = public_values(read_json(run.folder / file))
            value["model"].update(name_or_path=name, revision=origin.revision)
            run.write_json(file, value)
    for file in (MERGE_RECORD, KNOCKOUT_RECORD):
        if (run.folder / file).is_file():
            value = read_json(run.folder / file)
            key = "base" if "base" in value else "model"
            run.write_json(file, {**value, key: name, "revision": origin.revision})
    if (run.folder / SELECTION).is_file():
        value = public_values(read_json(run.folder / SELECTION))
        run.write_json(SELECTION, {**value, "model": name, "revision": origin.revision})


def _name_in_commands(run: RunFolder, base: str | None, public: Published) -> None:
    """The base's public name and the repo in the commands that serve a folder, and in what says how it was
    exported."""
    name = public.origin.model_id or public.origin.name
    page, record = run.folder / "serve.md", run.folder / "export.json"
    if page.is_file():
        text, old = page.read_text(encoding="utf-8"), public_name(base)
        if old and old != name:
            text = re.sub(rf"(?<![\w./-]){re.escape(old)}(?![\w./-])", lambda _: name, text)
        run.write_text(page.name, text.replace(HERE, public.where))
    if record.is_file():
        value = read_json(record)
        if value.get("base"):
            run.write_json(record.name, {**value, "base": name})


def _draw(run: RunFolder) -> None:
    from vfl_train.report.heatmap import save_heatmap

    with run.replacing(PICTURE) as path:
        save_heatmap(Profile.load(run.folder), path)


def _card(folder: Path, source: Path, public: Published) -> str:
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
        if (folder / MIGRATION_RECORD).is_file():
            return renamed_card(config, public)
        if not (folder / "plan.json").is_file():
            raise ConfigError(
                f"{source} has no plan.json, so that its card cannot say what was trained",
                "export the output of vfl-train lora",
            )
        readme = source / "README.md"
        table = table_of(readme.read_text(encoding="utf-8")) if readme.is_file() else ""
        return adapter_card(_plan(folder), table, config["r"], config["lora_alpha"], public)
    if (folder / KNOCKOUT_RECORD).is_file():
        found = read_json(folder / KNOCKOUT_RECORD)
        return knockout_card(found["layer"], found["zeroed"], found["dtype"], public)
    if (folder / MERGE_RECORD).is_file():
        found = read_json(folder / MERGE_RECORD)
        return merged_card(
            found["adapters"], found["difference"]["value"], found["dtype"], public, found.get("score")
        )
    if (folder / SELECTION).is_file():
        return selection_card(read_json(folder / SELECTION), public, any(folder.glob("selected.*")))
    if (folder / PROFILE).is_file():
        return profile_card(Profile.load(folder), public)
    raise ConfigError(
        f"{source} does not say how it was made", "export the output of vfl-train merge or lora"
    )


def _plan(folder: Path) -> LayerPlan:
    value = read_json(folder / "plan.json")
    try:
        return LayerPlan(
            model=ModelInfo(**value["model"]), layers=tuple(value["layers"]), functions=value["functions"],
            layer_rule=value["layer_rule"], control=value["control"],
            module_names=tuple(value["module_names"]), skipped=tuple(value["skipped"]),
            trainable_parameters=value["trainable_parameters"], part_modules=value.get("part_modules", {}),
        )  # fmt: skip
    except (KeyError, TypeError) as e:
        raise ConfigError(f"{folder / 'plan.json'} does not follow the plan contract: {e}") from None


# --- folders without weights ---------------------------------------------------------------------


def export_record(config: ExportConfig, kind: str) -> Path:
    """Export (and push) the profile or selection of `config`. Of a selection the rows themselves, which are
    the user's data, go along with --with-rows only; the report, which shows pictures of them, never does.

    Returns:
        The output folder, with a manifest of its own.

    Raises:
        ConfigError, HubError, VerificationError: as `export`.
    """
    source = Path(config.source)
    verify_manifest(source)
    publication = prepare(config, kind)
    names = _record_names(source, kind, config.with_rows)
    if config.dry_run:
        refuse_secrets(source, [n for n in names if n not in (PROFILE, SELECTION)])
        say(publication, names)
        return Path(config.output)
    inputs = {"source": file_sha256(source / MANIFEST), **publication.inputs}
    with RunFolder.open(config.output, fingerprint("export", config, inputs), config.overwrite) as run:
        if not run.already_done:
            for name in names:
                with run.replacing(name) as temporary:
                    shutil.copyfile(source / name, temporary)
            if kind == "profile" and not config.with_rows:
                _leave_out_own_examples(run)
            publication.finish(run, source)
    publication.push(run.folder)
    return run.folder


def _record_names(source: Path, kind: str, with_rows: bool) -> list[str]:
    listed = read_manifest(source)
    names = [name for name in RECORDS[kind] if name in listed]
    if with_rows and kind == "selection":
        names += [n for n in sorted(listed) if n.startswith("selected.") and "/" not in n]
    return names


def _leave_out_own_examples(run: RunFolder) -> None:
    """Questions and answers of the user's own probes are the user's data too."""
    value: dict[str, Any] = read_json(run.folder / PROFILE)
    if value.get("settings", {}).get("own_probes"):
        for function in value["functions"].values():
            function["examples"] = []
        run.write_json(PROFILE, value)


def say(publication: Publication, names: list[str]) -> None:
    """--dry-run: what would be written, and where it would go."""
    origin, repo = publication.public.origin, publication.public.repo
    added = {"README.md", MANIFEST, *origin.licence_files, *([PICTURE] if publication.public.picture else [])}
    print("\n".join(sorted({*names, *added})))
    print(f"base model: {origin.model_id or origin.name}, revision {origin.revision or 'not known'}")
    if repo:
        kind = "dataset" if publication.kind == "selection" else "model"
        print(f"to {kind} repo {repo}{', private' if publication.private else ''}")
