"""Uploading a finished folder to the Hub: its listed files and nothing else, in one commit.

Large files go up first, each by its hash, so that a push that was cut short finds them there when it runs
again; the repo shows none of them until the one commit that names all. After it the Hub is asked for the
hash of every file.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfl_train.errors import ConfigError, HubError, VflError
from vfl_train.hub.manifest import read_manifest, verify_manifest
from vfl_train.hub.privacy import find_secret_in_file
from vfl_train.hub.retry import FAILURES, as_hub_error, polite_client, trying
from vfl_train.runs import MANIFEST

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What tells what a repo holds. A push of one kind into a repo of another would leave a mixture.
MARKS = {
    "adapter": "adapter_config.json", "merged": "config.json", "selection": "selection.json",
    "profile": "profile.json",
}  # fmt: skip
log = logging.getLogger(__name__)


def hub_api(repo: str) -> HfApi:
    """The Hub's client with the token of this machine (HF_TOKEN or `hf auth login`; no option holds it).

    Raises:
        HubError: no token, one that the Hub does not know, or one that cannot write to `repo`.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise HubError("there is no Hugging Face token on this machine", "`hf auth login`, or set HF_TOKEN")
    api = HfApi()
    with polite_client():
        who = trying(api.whoami, "asking the Hub who this token belongs to")
    owner, role = repo.partition("/")[0], _role(who)
    owners = [who.get("name"), *(org.get("name") for org in who.get("orgs") or [])]
    if owner not in owners:
        raise HubError(
            f"the token belongs to {who.get('name')}, who cannot make {repo}",
            f"push to {who.get('name')}/NAME, or `hf auth login` as a member of {owner}",
        )
    if role == "read":
        raise HubError(
            "the token may only read", "`hf auth login` with one that may write, from hf.co/settings/tokens"
        )
    return api


def _role(who: dict[str, Any]) -> str | None:
    auth = who.get("auth")
    token = auth.get("accessToken") if isinstance(auth, dict) else None
    return token.get("role") if isinstance(token, dict) else None


def push_folder(api: HfApi, folder: Path, repo: str, kind: str, private: bool = False) -> str:
    """Upload the files that the manifest of `folder` lists, and the manifest, to `repo` (made if it is not
    there; a selection is a dataset, all else a model). Files of an earlier push that this one does not have
    are removed in the same commit.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: a secret in a file, a repo that holds something else, or a public one for --private.
        HubError: the Hub refuses or cannot be reached, also after several attempts.
        VerificationError: a file was changed since it was written.
    """
    verify_manifest(folder)
    names = sorted([*read_manifest(folder), MANIFEST])
    refuse_secrets(folder, names)
    repo_type = "dataset" if kind == "selection" else "model"
    with polite_client():
        trying(
            lambda: api.create_repo(repo, repo_type=repo_type, private=private or None, exist_ok=True),
            f"making {repo}",
        )
        there = _look_at(api, repo, repo_type, kind, private)
        stale = _earlier(api, repo, repo_type, there) - set(names)
        size = sum((folder / n).stat().st_size for n in names) / 1e6
        log.info("uploading %d files, %.1f MB, to %s", len(names), size, repo)
        commit = trying(
            lambda: _commit(api, folder, names, repo, repo_type, kind, stale),
            f"uploading to {repo}",
        )
        _compare(api, folder, names, repo, repo_type, commit.oid)
    log.info("%s has all %d files at commit %s", repo, len(names), commit.oid)
    return str(commit.commit_url)


def refuse_secrets(folder: Path, names: Iterable[str]) -> None:
    """Raises ConfigError naming the first file with what looks like a token or a home folder's path."""
    for name in names:
        secret = find_secret_in_file(folder / name)
        if secret:
            raise ConfigError(
                f"{name} holds what looks like a token or a path of this machine: {secret}",
                "take it out where it comes from and run that command again",
            )


def _look_at(api: HfApi, repo: str, repo_type: str, kind: str, private: bool) -> set[str]:
    """Names of the files in the repo. Raises ConfigError if they are something else's."""
    info: Any = trying(lambda: api.repo_info(repo, repo_type=repo_type), f"looking at {repo}")
    if private and not info.private:
        raise ConfigError(
            f"{repo} is there already and public", "make it private in its settings, or give another name"
        )
    there = {s.rfilename for s in info.siblings or []}
    found = next((k for k, mark in MARKS.items() if mark in there), kind)
    if found != kind:
        raise ConfigError(f"{repo} holds another kind of thing ({found}), not a {kind}", "give another name")
    return there


def _earlier(api: HfApi, repo: str, repo_type: str, there: set[str]) -> set[str]:
    """Files that an earlier push put there, by its manifest; what the owner added by hand is left alone."""
    if MANIFEST not in there:
        return set()
    path = trying(lambda: api.hf_hub_download(repo, MANIFEST, repo_type=repo_type), f"reading {repo}")
    try:
        return there & set(read_manifest(Path(path).parent))
    except VflError:
        return set()  # not one of ours


def _commit(
    api: HfApi, folder: Path, names: list[str], repo: str, repo_type: str, kind: str, stale: set[str]
) -> Any:
    """One commit with all files. Made anew for each attempt: files that the repo has by then, because the
    answer to an earlier commit was lost, are found to be there and left out."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in names]
    try:
        api.preupload_lfs_files(repo, additions, repo_type=repo_type, free_memory=False)
    except FAILURES as e:  # the client has tried again already, for each file
        raise as_hub_error(e, f"uploading to {repo}") from e
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on metadata; errors are raised
        return api.create_commit(
            repo,
            [*additions, *(CommitOperationDelete(path_in_repo=name) for name in sorted(stale))],
            commit_message=f"Upload {kind} with vfl-train",
            repo_type=repo_type,
        )


def _compare(api: HfApi, folder: Path, names: list[str], repo: str, repo_type: str, commit: str) -> None:
    """Raises HubError unless the repo has every file at `commit`, byte for byte."""
    from huggingface_hub import CommitOperationAdd

    found = trying(
        lambda: api.get_paths_info(repo, names, revision=commit, repo_type=repo_type), f"checking {repo}"
    )
    theirs = {file.path: file for file in found}
    for name in names:
        file = theirs.get(name)
        local = CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name))
        lfs = getattr(file, "lfs", None)
        if lfs is not None:
            same = lfs.sha256 == local.upload_info.sha256.hex()
        else:
            same = getattr(file, "blob_id", None) == _git_blob(folder / name)
        if not same:
            raise HubError(f"{name} at commit {commit} of {repo} is not what was sent", "push again")


def _git_blob(path: Path) -> str:
    """git's name for a file's content."""
    import hashlib

    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
