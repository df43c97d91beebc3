"""Which function a row trains: found by proof, refused without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from selections import write_selection

from vfl_train.config import LoraConfig
from vfl_train.data.readers import Dataset, read_dataset
from vfl_train.errors import ConfigError, DataError
from vfl_train.runs import file_sha256
from vfl_train.training.buckets import Buckets, find_buckets

BUCKETS = ["ocr", "count", "language", "ocr"] * 6
CHOSEN = [0, 1, 5, 6, 11, 12, 23]
WANTED = {new: BUCKETS[old] for new, old in enumerate(CHOSEN)}


@pytest.fixture
def selection(tmp_path: Path, data_file: Path) -> Path:
    return write_selection(tmp_path / "select", data_file, BUCKETS, CHOSEN)


@pytest.fixture
def find(make_config: Callable[..., LoraConfig], tmp_path: Path, data_file: Path) -> Callable[..., Buckets]:
    def found(data: Path, scores: Path | None = None) -> Buckets | None:
        config = make_config(tmp_path / "out", data=str(data), scores=scores, image_root=data_file.parent)
        dataset: Dataset = read_dataset(data, data_file.parent)
        return find_buckets(config, dataset.rows, dataset.sha256)

    return found


def test_selected_rows_are_found_beside_their_scores(find, selection: Path) -> None:
    found = find(selection)
    assert found.of == WANTED
    assert found.sha256 == file_sha256(selection.parent / "scores.parquet")


def test_the_folder_that_select_wrote_stands_for_what_it_picked(find, selection: Path) -> None:
    assert find(selection.parent).of == WANTED


def test_a_copy_elsewhere_needs_scores(find, selection: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(selection.read_bytes())
    assert find(copy) is None
    assert find(copy, selection.parent).of == WANTED


def test_the_pool_itself_is_matched_by_uid(find, selection: Path, data_file: Path) -> None:
    assert find(data_file, selection.parent).of == dict(enumerate(BUCKETS))


def test_rows_written_anew_are_proven_one_by_one(find, selection: Path, tmp_path: Path) -> None:
    """Other key order and spacing, same content: the file's hash does not fit, each row's uid does."""
    rows = [json.loads(line) for line in selection.read_text().splitlines()]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(dict(sorted(r.items())), indent=None) + "\n" for r in rows))
    assert other.read_bytes() != selection.read_bytes()
    assert find(other, selection.parent).of == WANTED


@pytest.mark.parametrize("change", ["edited", "reordered", "longer", "other file"])
def test_what_is_not_that_selection_is_refused(
    find, selection: Path, data_file: Path, tmp_path: Path, change: str
) -> None:
    lines = selection.read_text().splitlines()
    if change == "edited":
        lines[2] = lines[2].replace('"role": "assistant", "content": "', '"role": "assistant", "content": "x')
    elif change == "reordered":
        lines[1], lines[2] = lines[2], lines[1]
    elif change == "longer":
        lines.append(data_file.read_text().splitlines()[2])
    else:
        lines = data_file.read_text().splitlines()[2:5]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"row \d+ of the data is") as caught:
        find(path, selection.parent)
    assert caught.value.exit_code == 3 and "--scores" in caught.value.fix


def test_a_pool_with_rows_that_were_never_scored_is_refused(
    find, selection: Path, data_file: Path, tmp_path: Path
) -> None:
    longer = tmp_path / "rows.jsonl"  # the pool's own name: it is part of a row's uid
    line = data_file.read_text().splitlines()[3].replace('"content": "', '"content": "Well, ', 1)
    longer.write_text(data_file.read_text() + line + "\n")
    with pytest.raises(DataError, match="no score of row 24"):
        find(longer, selection.parent)


def test_folders_that_are_no_selection_are_refused(find, selection: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no scores\.parquet"):
        find(selection, tmp_path)
    (selection.parent / "scores.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ConfigError, match="cannot be read"):
        find(selection)


def test_rows_of_a_bucket_and_their_counts(find, selection: Path, data_file: Path) -> None:
    found = find(selection)
    rows = read_dataset(selection, data_file.parent).rows
    assert [r.row for r in found.rows_of("count", rows)] == [n for n, b in WANTED.items() if b == "count"]
    assert sum(found.counts(rows).values()) == len(CHOSEN)


def test_a_selected_folder_is_told_by_its_data_file(find, selection: Path) -> None:
    """What select writes of a `datasets` folder is a folder, and manifests list files."""
    import datasets

    rows = [json.loads(line) for line in selection.read_text().splitlines()]
    folder = selection.parent / "selected"
    datasets.Dataset.from_list(rows).save_to_disk(folder)
    selection.unlink()
    (selection.parent / "selection.json").write_text(json.dumps({"selected": "selected"}))
    name = "data-00000-of-00001.arrow"
    files = {f"selected/{name}": {"sha256": file_sha256(folder / name)}}
    (selection.parent / "manifest.json").write_text(json.dumps({"files": files}))
    assert find(folder).of == WANTED
