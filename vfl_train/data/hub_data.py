"""Data sets of the Hub: their data files are fetched into the cache, nothing in them is run."""

from __future__ import annotations

import fnmatch
import logging
from pathlib import Path

from vfl_train.errors import ConfigError, HubError
from vfl_train.hub.fetching import fetching

log = logging.getLogger(__name__)

# Data and images; never a script, and nothing that is code when loaded.
PATTERNS = (
    "*.parquet", "*.arrow", "*.tar", "*.jsonl", "*.json", "*.jpg", "*.jpeg", "*.png", "*.webp",
)  # fmt: skip


def fetch_data(repo: str, revision: str | None, inside: str | None) -> tuple[Path, list[Path]]:
    """Fetch a data set, or the files of it that a pattern names, into the Hub's cache.

    Args:
        repo: owner/name.
        inside: a path or pattern inside the repo, such as data/train-*.parquet.

    Returns:
        The folder of the snapshot, and the files that `inside` names, by name ([] without it).

    Raises:
        ConfigError: no such data set, no access, or no such file in it.
        HubError: the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    nowhere = f"there is no file or folder {repo}, and"
    with fetching(
        missing=ConfigError(
            f"{nowhere} the Hub has no data set {repo}, or gives no access",
            "check the name; `hf auth login` for private ones",
        ),
        no_revision=ConfigError(f"the data set {repo} of the Hub has no revision {revision}"),
        unreachable=HubError(
            f"{nowhere} the Hub cannot be reached for it", "check the connection, or give a local file"
        ),
        failed=lambda reason: HubError(
            f"{nowhere} the data set of that name on the Hub cannot be fetched: {reason}"
        ),
    ):
        patterns = [inside] if inside else list(PATTERNS)
        found = snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns)
    folder = Path(found)
    log.info("data set %s of the Hub, revision %s", repo, folder.name)
    if inside is None:
        return folder, []
    every = (file for file in sorted(folder.rglob("*")) if file.is_file())
    files = [file for file in every if fnmatch.fnmatch(file.relative_to(folder).as_posix(), inside)]
    if not files:
        raise ConfigError(f"the data set {repo} of the Hub has no file {inside}", "check --data")
    return folder, files
