"""Which kind of data a path names: told from content and logged, never guessed.

A path is a file, a folder (of `datasets.save_to_disk`, of parquet, arrow or tar shards, or the output of
select, which stands for the rows it picked), a pattern of shards such as `pool-{000..011}.tar` or
`pool/*.parquet`, or a data set of the Hub (`owner/name`, `hub:owner/name@revision/data/train-*.parquet`).
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from vfl_train.data.json_files import JsonFile
from vfl_train.data.pool import FIX_FORMAT, Container
from vfl_train.data.records import detect_container
from vfl_train.errors import ConfigError

SHARDS = (".parquet", ".arrow", ".tar")
TEXT = (".jsonl", ".json")
FIX_PACKED = {
    ".gz": "unpack it with gunzip; of a .tar.gz give the .tar",
    ".bz2": "unpack it with bunzip2",
    ".xz": "unpack it with unxz",
    ".zst": "unpack it with unzstd",
    ".zip": "unpack it with unzip; the images of a folder are found by --image-root",
    ".csv": "convert it to JSONL, one object with `messages` or `conversations` a line",
    ".tsv": "convert it to JSONL, one object with `messages` or `conversations` a line",
}
MAGICS = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PK\x03\x04": ".zip",
    b"PAR1": ".parquet",
    b"ARROW1": ".arrow",
    b"\xff\xff\xff\xff": ".arrow",
}
MAX_PATTERN = 1_000_000  # files that one pattern may name
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
_HUB = re.compile(r"(?:hub:)?([\w][\w.-]*/[\w][\w.-]*)(?:@([\w.-]+))?(?:/(.+))?")
# What the Hub's naming of splits allows: train-00000-of-00002.parquet, data/test/0.tar
_SPLIT = re.compile(r"(?:^|[/._-])(train|training|validation|valid|val|dev|test|testing|eval)(?=[/._\-\d]|$)")


def open_container(path: str | os.PathLike) -> tuple[Path, Container]:
    """The file or folder that `path` names, and its container.

    Raises:
        ConfigError: nothing there, a format that cannot be read, or a folder that could mean several things.
        DataError: an empty or damaged file.
        HubError: the Hub cannot be reached.
    """
    name, file = os.fspath(path), Path(path)
    if file.is_dir():
        picked = selected_file(file)
        return open_container(picked) if picked else (file, _folder(file))
    if file.is_file():
        return file, _files([file])
    if file.exists():
        raise ConfigError(f"{file} is neither a file nor a folder", "check --data")
    if ("{" in name or glob.has_magic(name)) and not name.startswith("hub:"):
        return _pattern(name)
    wanted = _HUB.fullmatch(name)
    if wanted and (name.startswith("hub:") or (not file.suffix and not wanted[3])):
        from vfl_train.data.hub_data import fetch_data

        folder, files = fetch_data(wanted[1], wanted[2], wanted[3])
        return folder, _files(files) if files else _folder(folder)
    raise ConfigError(f"there is no file {file}", "check --data")


def selected_file(folder: Path) -> Path | None:
    """The rows that select picked, in the format they came in, if `folder` is its output."""
    try:
        name = json.loads((folder / "selection.json").read_text(encoding="utf-8"))["selected"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    own = isinstance(name, str) and name.startswith("selected") and name == Path(name).name
    return folder / name if own else None


def kind_of(file: Path) -> str:
    """json, jsonl, parquet, arrow or tar. Raises ConfigError for what cannot be read, DataError if empty."""
    suffix = file.suffix.lower()
    with file.open("rb") as stream:
        head = stream.read(512)
    found = next((kind for magic, kind in MAGICS.items() if head.startswith(magic)), "")
    if head[257:262] == b"ustar" or (suffix == ".tar" and not found):
        found = ".tar"
    found = found or (suffix if suffix in FIX_PACKED else "")
    if found in FIX_PACKED:
        raise ConfigError(f"{file}: {found} files cannot be read", FIX_PACKED[found])
    if not found and suffix in SHARDS and head:
        raise ConfigError(f"{file} is no {suffix} file", "copy it again; it is damaged")
    return found.removeprefix(".") or detect_container(file)


def _files(files: list[Path]) -> Container:
    """The container of these files, which must be of one kind."""
    kinds = {file: kind_of(file) for file in files}
    kind = kinds[files[0]]
    other = next((file for file in files if kinds[file] != kind), None)
    if other is not None:
        message = f"{files[0]} is {kind} and {other.name} is {kinds[other]}"
        raise ConfigError(message, "give files of one kind")
    if kind in ("json", "jsonl"):
        if len(files) > 1:
            raise ConfigError(f"{len(files)} {kind} files cannot be read as one", "join them: cat *.jsonl")
        return JsonFile(files[0], kind)
    return _open_shards(kind)(files)


def _open_shards(kind: str) -> Callable[[list[Path]], Container]:
    # Imported here: text files need no pyarrow, which takes its time.
    if kind == "parquet":
        from vfl_train.data.parquet_files import ParquetShards

        return ParquetShards
    if kind == "arrow":
        from vfl_train.data.arrow_files import ArrowFiles

        return ArrowFiles
    from vfl_train.data.tar_files import TarShards

    return TarShards


def _folder(folder: Path) -> Container:
    from vfl_train.data.arrow_files import STATE, ArrowFiles, folder_files

    if (folder / STATE).is_file():
        return ArrowFiles(folder_files(folder), folder)
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in folder.iterdir() if (child / STATE).is_file())
        return _one_split(folder, splits)
    found = {suffix: list(_below(folder, suffix)) for suffix in (*SHARDS, *TEXT)}
    kinds = [suffix for suffix in SHARDS if found[suffix]] or [s for s in TEXT if found[s]]
    if not kinds:
        raise ConfigError(f"{folder} holds no data file", FIX_FORMAT)
    if len(kinds) > 1:
        names = ", ".join(f"{len(found[kind])} {kind}" for kind in kinds)
        raise ConfigError(f"{folder} holds {names} files", f"name one kind: {folder}/*{kinds[0]}")
    files = found[kinds[0]]
    named = {m[1] for file in files if (m := _SPLIT.search(file.relative_to(folder).as_posix()))}
    if len(named) > 1:
        message = f"{folder} holds the splits {', '.join(sorted(named))}"
        raise ConfigError(message, f"name one with a pattern: '{folder}/**/*train*{kinds[0]}'")
    return _files(files)


def _one_split(folder: Path, splits: list[str]) -> Container:
    if len(splits) == 1:
        return _folder(folder / splits[0])
    names = ", ".join(splits) or "none"
    fix = f"name one: {folder / splits[0]}" if splits else "save the data set again"
    raise ConfigError(f"{folder} holds several splits ({names})", fix)


def _below(folder: Path, suffix: str) -> Iterator[Path]:
    """The files of this suffix in a folder and below, by name; hidden ones and links out are left alone."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(suffix) and not name.startswith("."):
                yield Path(parent, name)


def _pattern(pattern: str) -> tuple[Path, Container]:
    """The files that a pattern names, and the folder they lie in."""
    files: list[Path] = []
    for name in _expand(pattern):
        if glob.has_magic(name):
            files += [Path(found) for found in sorted(glob.glob(name, recursive=True))]
        else:
            files.append(Path(name))
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None or not files:
        raise ConfigError(f"there is no file {missing or pattern}", "check --data")
    folder = Path(os.path.commonpath([file.parent for file in files]))
    return folder, _files(list(dict.fromkeys(files)))


def _expand(pattern: str) -> list[str]:
    """Braces written out: {00..03} and {a,b}. Raises ConfigError if that gives too many files."""
    done, waiting = [], [pattern]
    while waiting:
        name = waiting.pop(0)
        if span := _RANGE.search(name):
            low, high = int(span[1]), int(span[2])
            if high - low >= MAX_PATTERN:
                raise ConfigError(f"{pattern} names {high - low + 1} files", "check --data")
            width = len(span[1]) if span[1].startswith("0") else 0
            parts = [str(number).zfill(width) for number in range(low, high + 1)]
        elif span := _CHOICE.search(name):
            parts = span[1].split(",")
        else:
            done.append(name)
            continue
        waiting += [name[: span.start()] + part + name[span.end() :] for part in parts]
        if len(waiting) + len(done) > MAX_PATTERN:
            raise ConfigError(f"{pattern} names more than {MAX_PATTERN} files", "check --data")
    return done
