"""The base model as public files may name it: its Hub id and commit, and the licence that comes with it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vfl_train.errors import ConfigError
from vfl_train.hub.privacy import public_name
from vfl_train.runs import file_sha256

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_UNNAMED = "base-model"  # the name of a licence that is only a file
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin:
    """A base model. `model_id` is its Hub id (None: the bundled model, or a folder of this machine),
    `revision` a commit; `name` what a text calls it. `licence` holds the keys of a card's metadata that say
    the licence, none if it is not known; `licence_files` (name -> content) go with the weights."""

    name: str
    model_id: str | None = None
    revision: str | None = None
    bundled: bool = False
    licence: dict[str, Any] = field(default_factory=dict)
    licence_files: dict[str, bytes] = field(default_factory=dict)

    @property
    def licence_sentence(self) -> str:
        """What a card says of the licence, in one sentence."""
        if self.bundled:
            return (
                "The base model comes with vfl-train, under the Apache licence 2.0; this one is under it too."
            )
        known = self.licence.get("license_name") or self.licence.get("license")
        if known and known not in ("other", _UNNAMED):
            return f"The base model is under the licence `{known}`, which applies to this one too."
        if self.licence:
            return "The licence of the base model, which lies here as a file, applies to this one too."
        return (
            "The licence of the base model applies to this one too; what it is could not be read when this "
            "card was written."
        )


def local_origin(name: str | None, revision: str | None) -> Origin:
    """What this machine knows of a base model that an adapter or a profile names, without the network."""
    from vfl_train.models.vlm import BUNDLED

    if not name:
        return Origin("an unnamed base model")
    if name in BUNDLED:
        return Origin(name, bundled=True, licence={"license": "apache-2.0"})
    folder = Path(name).expanduser()
    if folder.is_dir():
        licence, files = _licence_of_folder(folder)
        found = _of_cache(folder)
        if found is not None:
            return Origin(found[0], *found, licence=licence, licence_files=files)
        return Origin(folder.resolve().name, licence=licence, licence_files=files)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return Origin(public_name(name) or "a base model")
    cached = _cached_folder(name, revision)
    licence, files = _licence_of_folder(cached) if cached else ({}, {})
    commit = cached.name if cached else revision
    return Origin(name, name, commit if commit and _COMMIT.match(commit) else revision, False, licence, files)


def hub_origin(api: HfApi, name: str | None, revision: str | None, given: str | None) -> Origin:
    """The base model as the Hub has it, for files that are published there.

    Args:
        given: ORG/NAME or ORG/NAME@COMMIT by the user (`--base-model-id`), for a base that is a folder.

    Raises:
        ConfigError: the base is a folder of this machine and nothing says what it is on the Hub, the Hub has
            no such model, or its weights are not those of the folder.
        HubError: the Hub cannot be reached.
    """
    known = local_origin(name, revision)
    if known.bundled and given is None:
        return known
    wanted, at = known.model_id, known.revision
    if given is not None:
        wanted, _, commit = given.partition("@")
        at = commit or (at if wanted == known.model_id else None)
    if wanted is None:
        raise ConfigError(
            f"the base model {known.name} is a folder of this machine, which nobody else can load",
            "say what it is on the Hub: --base-model-id ORG/NAME",
        )
    info = _model_info(api, wanted, at)
    if given is not None and name and Path(name).expanduser().is_dir():
        _same_weights(Path(name).expanduser(), info, wanted)
    licence = (
        {k: v for k in _LICENCE_KEYS if (v := getattr(info.card_data, k, None))} if info.card_data else {}
    )
    files = _licence_files_on_hub(api, wanted, info)
    link = licence.get("license_link")
    if isinstance(link, str) and "://" not in link and link not in files:
        licence["license_link"] = f"https://huggingface.co/{wanted}/blob/{info.sha}/{link}"
    if not known.bundled:  # whose licence says nothing of another model
        licence, files = licence or known.licence, files or known.licence_files
    return Origin(wanted, wanted, info.sha, False, licence, files)


def _model_info(api: HfApi, name: str, revision: str | None) -> ModelInfo:
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    from vfl_train.hub.retry import trying

    def ask() -> ModelInfo:
        try:
            return api.model_info(name, revision=revision, files_metadata=True)
        except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
            raise ConfigError(
                f"the Hub has no base model {name} at {revision or 'main'}, or gives no access",
                "--base-model-id ORG/NAME says what the base is on the Hub",
            ) from None

    return trying(ask, f"asking for {name}")


def _same_weights(folder: Path, info: ModelInfo, name: str) -> None:
    """Raises ConfigError unless the safetensors files of `folder` are those of the Hub model."""
    theirs = {s.rfilename: s.lfs.sha256 for s in info.siblings or [] if s.lfs is not None}
    ours = sorted(p.name for p in folder.glob("*.safetensors"))
    wrong = [n for n in ours if theirs.get(n) != file_sha256(folder / n)]
    if wrong or not ours:
        raise ConfigError(
            f"{wrong[0] if wrong else 'the weights'} in {folder} and in {name} on the Hub differ",
            "publish the base first, or name the one that this was made of",
        )


def _licence_files_on_hub(api: HfApi, name: str, info: ModelInfo) -> dict[str, bytes]:
    from vfl_train.hub.retry import trying

    there = {s.rfilename for s in info.siblings or []}
    found = {}
    for file in LICENCE_FILES:
        if file in there:
            fetch = partial(api.hf_hub_download, name, file, revision=info.sha)
            found[file] = Path(trying(fetch, f"fetching {file} of {name}")).read_bytes()
    return found


def _licence_of_folder(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(metadata, files) of a model folder: its card's licence, else its licence file."""
    files = {name: (folder / name).read_bytes() for name in LICENCE_FILES if (folder / name).is_file()}
    head = front_matter((folder / "README.md").read_text("utf-8", "replace"))[0] if (
        folder / "README.md"
    ).is_file() else {}  # fmt: skip
    licence = {key: head[key] for key in _LICENCE_KEYS if head.get(key)}
    own = next((n for n in files if n.startswith("LICENSE")), None)
    if not licence and own:
        licence = {"license": "other", "license_name": _UNNAMED, "license_link": own}
    return licence, files


def _of_cache(folder: Path) -> tuple[str, str] | None:
    """(Hub id, commit) of a folder in the Hub's cache: .../models--ORG--NAME/snapshots/COMMIT."""
    folder = folder.resolve()
    kind, _, rest = folder.parent.parent.name.partition("--")
    if folder.parent.name != "snapshots" or kind != "models" or not _COMMIT.match(folder.name):
        return None
    return rest.replace("--", "/"), folder.name


def _cached_folder(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def dataset_id(name: str) -> str | None:
    """The Hub id in the name of training data (`owner/name`, `hub:owner/name@commit/file`); None for what
    lies on this machine."""
    match = re.fullmatch(r"(hub:)?(\w[\w.-]*/\w[\w.-]*)(?:@[\w.-]+)?(/.+)?", name)
    if match is None or (not match[1] and (match[3] or Path(name).suffix or Path(name).exists())):
        return None
    return match[2]


def front_matter(text: str) -> tuple[dict[str, Any], str]:
    """(metadata, rest) of a card; no metadata where there is none or it is not YAML."""
    match = re.match(r"\A---\r?\n(.*?)\r?\n---\r?\n", text, re.DOTALL)
    if match is None:
        return {}, text
    try:
        values = yaml.safe_load(match[1])
    except yaml.YAMLError:
        values = None
    return (values if isinstance(values, dict) else {}), text[match.end() :]
