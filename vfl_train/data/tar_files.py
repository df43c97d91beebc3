"""Webdataset shards: tar files in which members that share a key are one sample.

The key of a member is its name up to the first dot of its last part. A sample is one .json member, with the
row, and its images, in the order in which they lie there; a row that names images means members of its
own sample. Nothing is extracted: an image is a place in the tar file.
"""

from __future__ import annotations

import os
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vfl_train.data.images import MAX_BYTES
from vfl_train.data.output import write_file
from vfl_train.data.records import MAX_ROW_BYTES, Record, decode_record
from vfl_train.data.rows import ImageRef, Reason, RowError, one_line
from vfl_train.errors import DataError

BLOCK = tarfile.BLOCKSIZE
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "img", "image")
_BROKEN = (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, EOFError)


@dataclass(frozen=True, slots=True)
class _Member:
    """A member of a sample: bytes [start, start + size) of the file; `problem` if it is no plain file."""

    name: str
    start: int
    size: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Sample:
    """The members that share a key and lie together, and the blocks [start, stop) they take up."""

    members: tuple[_Member, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TarImage:
    """The bytes of one image in a tar file."""

    file: str
    start: int
    size: int

    def read(self) -> bytes:
        """The encoded bytes. Raises RowError if they are too many or end too early."""
        if self.size > MAX_BYTES:
            raise RowError(Reason.image_too_large, f"the image has {self.size} bytes, at most {MAX_BYTES}")
        found = _read(Path(self.file), self.start, self.size)
        if len(found) < self.size:
            raise RowError(Reason.image_truncated, "the tar file ends within the image")
        return found


class TarShards:
    """Tar files, read as one. What is kept of a sample is where its blocks lie: 20 bytes."""

    kind, extension = "tar", ".tar"

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(files)
        self._shards, self._starts, self._stops = array("i"), array("q"), array("q")
        self._complete = False

    def __len__(self) -> int:
        if not self._complete:
            for _ in self._scan(0):
                pass
        return len(self._starts)

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """The samples from `start` on, up to before `stop`. Raises DataError where a file is damaged."""
        if start or (stop is not None and stop <= len(self._starts)):
            end = len(self) if stop is None else min(stop, len(self))
            yield from (self.record(number) for number in range(start, end))
            return
        for number, (file, sample) in enumerate(self._scan(0)):
            if stop is not None and number >= stop:
                return
            yield _record(file, sample)

    def record(self, number: int) -> Record:
        """One sample. Raises IndexError, DataError."""
        if number < 0 or (number >= len(self._starts) and number >= len(self)):
            raise IndexError(f"{self.files[0]} has {len(self)} samples, no sample {number}")
        file = self.files[self._shards[number]]
        sample = next(_samples(file, self._starts[number], self._stops[number]), None)
        if sample is None:
            raise DataError(f"{file} was changed while it was read", "start again")
        return _record(file, sample)

    def write(self, numbers: Iterable[int], path: Path) -> None:
        """Write these samples to one tar file, block for block as they are."""
        wanted = list(numbers)
        if wanted and wanted[-1] >= len(self._starts):
            len(self)
        write_file(path, self._blocks(wanted))

    def _blocks(self, numbers: Iterable[int]) -> Iterator[bytes]:
        written = 0
        for number in numbers:
            file, start, stop = self.files[self._shards[number]], self._starts[number], self._stops[number]
            with file.open("rb") as stream:
                stream.seek(start)
                while start < stop:
                    piece = stream.read(min(2**20, stop - start))
                    if not piece:
                        raise DataError(f"{file} was changed while it was read", "start again")
                    start += len(piece)
                    written += len(piece)
                    yield piece
        # Two empty blocks end an archive; tar rounds up to a record of 20 blocks.
        yield bytes(2 * BLOCK + -(written + 2 * BLOCK) % tarfile.RECORDSIZE)

    def _scan(self, number: int) -> Iterator[tuple[Path, _Sample]]:
        """All samples; notes where they lie."""
        for shard, file in enumerate(self.files):
            for sample in _samples(file):
                if number == len(self._starts):
                    self._shards.append(shard)
                    self._starts.append(sample.start)
                    self._stops.append(sample.stop)
                number += 1
                yield file, sample
        self._complete = True


def key_of(name: str) -> tuple[str, str]:
    """The sample's key and the member's extension: ("a/0001", "left.jpg") of "a/0001.left.jpg"."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def _samples(file: Path, start: int = 0, stop: int | None = None) -> Iterator[_Sample]:
    """The samples in the blocks [start, stop) of a file. Raises DataError if the file is damaged."""
    with file.open("rb") as stream:
        group: list[_Member] = []
        key, first, end = None, start, start
        for info in _infos(file, stream, start, stop):
            found = key_of(info.name)[0]
            behind = info.offset_data + -(-info.size // BLOCK) * BLOCK if info.isreg() else info.offset_data
            if found != key and group:
                yield _Sample(tuple(group), first, end)
                group = []
            if not group:
                first = info.offset
            key, end = found, behind
            group.append(_Member(info.name, info.offset_data, info.size, _problem(info)))
        if group:
            yield _Sample(tuple(group), first, end)


def _infos(file: Path, stream: BinaryIO, start: int, stop: int | None) -> Iterator[tarfile.TarInfo]:
    """The members but folders. tarfile takes a damaged header for the end; this does not."""
    fix = "copy the file again; it is damaged"
    size = os.fstat(stream.fileno()).st_size
    stream.seek(start)
    try:
        tar = tarfile.open(fileobj=stream, mode="r:", ignore_zeros=False)  # noqa: SIM115 - `stream` is closed
        while (info := tar.next()) is not None and (stop is None or info.offset < stop):
            vars(tar)["members"] = []  # a million of them would be a gigabyte
            if info.isreg() and info.offset_data + info.size > size:
                raise DataError(f"{file} ends within {one_line(info.name, 80)}", fix)
            if not info.isdir():
                yield info
        if info is None:
            stream.seek(tar.offset)
            rest = stream.read(BLOCK)
            if rest and (len(rest) < BLOCK or rest.strip(b"\0")):
                raise DataError(f"{file} is damaged at byte {tar.offset}", fix)
    except _BROKEN as error:
        raise DataError(f"{file} cannot be read as tar ({type(error).__name__})", fix) from error


def _problem(info: tarfile.TarInfo) -> str:
    """Why a member cannot be used, "" if it can."""
    if info.name.startswith(("/", "\\")) or ".." in re.split(r"[\\/]", info.name) or "\0" in info.name:
        return Reason.image_outside_root
    return "" if info.isreg() and not info.issparse() else Reason.image_not_a_file


def _record(file: Path, sample: _Sample) -> Record:
    """The row of a sample, its images as places in the file."""
    try:
        record = _json_record(file, sample)
        if record.problem is None and isinstance(record.value, dict):
            record.value = _with_images(file, sample, record.value)
    except RowError as problem:
        return Record(None, b"", {"id": key_of(sample.members[0].name)[0]}, problem)
    return record


def _json_record(file: Path, sample: _Sample) -> Record:
    for member in sample.members:
        if member.problem:
            shown = one_line(member.name, 120)
            raise RowError(Reason(member.problem), f"{shown} is a link, a device, or no plain relative name")
    found = [member for member in sample.members if key_of(member.name)[1] == "json"]
    if len(found) != 1:
        why = Reason.missing_key if not found else Reason.ambiguous_keys
        raise RowError(why, f"the sample has {len(found)} .json members")
    if found[0].size > MAX_ROW_BYTES:
        raise RowError(Reason.text_too_long, f"the .json member has {found[0].size} bytes")
    record = decode_record(None, _read(file, found[0].start, found[0].size))
    record.raw = b""
    if isinstance(record.value, dict) and record.value.get("id") is None:
        record.value["id"] = key_of(found[0].name)[0]
    return record


def _with_images(file: Path, sample: _Sample, value: dict) -> dict:
    """The row with its images and frames as places in the file: those it names, else all as images."""
    members = [m for m in sample.members if key_of(m.name)[1].rpartition(".")[2] in IMAGE_SUFFIXES]
    filmed = {key: value[key] for key in ("video", "videos") if isinstance(value.get(key), list)}
    value = {**value, **{key: _frames_named(file, members, listed) for key, listed in filmed.items()}}
    named = next((key for key in ("image", "images") if value.get(key) is not None), None)
    if named is None:
        refs: list[object] = [] if filmed else [_ref(file, member) for member in members]
        return {**value, "image": refs} if refs else value
    listed = value[named] if isinstance(value[named], list) else [value[named]]
    return {**value, named: [_named(file, members, name) for name in listed]}


def _frames_named(file: Path, members: list[_Member], listed: list) -> list:
    """Frames, or lists of them, as members. A video file that is named in place of a list stays a name."""
    if any(isinstance(each, list) for each in listed):
        return [_frames_named(file, members, each) if isinstance(each, list) else each for each in listed]
    if any(isinstance(each, str) and key_of(each)[1].rpartition(".")[2] in IMAGE_SUFFIXES for each in listed):
        return [_named(file, members, each) for each in listed]
    return listed


def _named(file: Path, members: list[_Member], name: object) -> object:
    """The member that a row names: by its name, the last part of it, or its extension."""
    if not isinstance(name, str):
        return name
    for member in members:
        if name in (member.name, member.name.rpartition("/")[2], key_of(member.name)[1]):
            return _ref(file, member)
    raise RowError(Reason.image_missing, f"{one_line(name, 120)} is not a member of the sample")


def _ref(file: Path, member: _Member) -> ImageRef:
    return ImageRef(None, None, one_line(member.name, 120), TarImage(str(file), member.start, member.size))


def _read(file: Path, start: int, size: int) -> bytes:
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        return stream.read(size)
