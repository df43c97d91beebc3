"""What is known of a base model: its Hub id and commit from the cache, its licence from its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from vfl_train.config import EvalConfig
from vfl_train.hub.origin import front_matter, local_origin
from vfl_train.hub.scorecard_card import measured
from vfl_train.runs import file_sha256

COMMIT = "0123456789abcdef" * 2 + "01234567"


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)
    return folder


def test_a_folder_of_the_cache_is_the_hub_model_it_came_from(tmp_path: Path) -> None:
    folder = write(tmp_path / "models--org--a-b" / "snapshots" / COMMIT, README_md="---\nlicense: mit\n---\n")
    origin = local_origin(str(folder), None)
    assert (origin.model_id, origin.revision) == ("org/a-b", COMMIT)
    assert origin.licence == {"license": "mit"} and "`mit`" in origin.licence_sentence


@pytest.mark.parametrize("name", ["models--org--a/snapshots/main", "elsewhere/b/" + COMMIT, "model"])
def test_other_folders_are_not(tmp_path: Path, name: str) -> None:
    origin = local_origin(str(write(tmp_path / name, config_json="{}")), None)
    assert origin.model_id is None and str(tmp_path) not in origin.name
    assert origin.licence == {} and "could not be read" in origin.licence_sentence


def test_a_licence_that_is_only_a_file_goes_along_and_is_called_other(tmp_path: Path) -> None:
    origin = local_origin(str(write(tmp_path / "m", LICENSE="Do good.", NOTICE="By us.")), None)
    assert origin.licence == {"license": "other", "license_name": "base-model", "license_link": "LICENSE"}
    assert origin.licence_files == {"LICENSE": b"Do good.", "NOTICE": b"By us."}


@pytest.mark.parametrize("text", ["", "# no metadata", "---\n[1, 2]\n---\n", "---\n{bad\n---\n", "---\nopen"])
def test_cards_without_metadata_say_nothing(text: str) -> None:
    assert front_matter(text)[0] == {}


def test_names_that_are_no_ids_are_not_asked_for(tmp_path: Path) -> None:
    for name in (None, "", "/gone/model", "../up/model", "one"):
        assert local_origin(name, None).model_id is None
    assert local_origin("phantom", None).bundled
    assert local_origin("org/model", COMMIT).revision == COMMIT


def test_a_scorecard_says_which_weights_and_questions_it_is_of(adapter: Path, tmp_path: Path) -> None:
    config = EvalConfig(model="phantom", adapter=str(adapter), output=tmp_path, data="/home/u/rows.jsonl")
    manifest = file_sha256(adapter / "manifest.json")
    assert measured(config, "ab") == {
        "questions": {"name": "rows.jsonl", "sha256": "ab"}, "manifest_sha256": manifest,
    }  # fmt: skip
    assert measured(EvalConfig(model="phantom", output=tmp_path), "ab") == {
        "questions": {"name": "built-in probes", "sha256": "ab"}, "manifest_sha256": None,
    }  # fmt: skip
