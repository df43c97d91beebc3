"""What is published: the base's Hub name, licence, card, scorecard, picture; profiles and selections."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hub_server import HubServer, metadata_errors
from PIL import Image
from small_profile import VALUE

from vfl_train.config import ExportConfig, MergeConfig, VerifyConfig
from vfl_train.errors import ConfigError, VerificationError
from vfl_train.hub.export import export
from vfl_train.hub.load import profile_file
from vfl_train.hub.manifest import verify_manifest
from vfl_train.hub.merge import merge
from vfl_train.hub.verify import verify
from vfl_train.runs import RunFolder, file_sha256
from vfl_train.schemas import Profile

REPO = "alice/tiny"
BASE_CARD = b"---\nlicense: other\nlicense_name: tiny-research\nlicense_link: LICENSE\n---\n# Base\n"


@pytest.fixture
def hub_base(hub: HubServer, base_folder: Path) -> str:
    """The base model on the Hub, with a licence of its own; returns its commit."""
    files = {p.name: p.read_bytes() for p in base_folder.iterdir()}
    return hub.add("org/base", {**files, "README.md": BASE_CARD, "LICENSE": b"Look, do not sell.\n"}).sha


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def remake(folder: Path, **files: Any) -> Path:
    """Put `files` (text, JSON values, or None for what lies there now) into a finished folder as if its
    command had written them."""
    value = json.loads((folder / "manifest.json").read_text())
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        value["files"][name] = {"sha256": file_sha256(folder / name), "bytes": (folder / name).stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(value))
    return folder


def head_of(card: str) -> dict[str, Any]:
    assert metadata_errors(card) == []
    return yaml.safe_load(card.split("---\n")[1])


def scorecard(folder: Path, path: Path, **changes: Any) -> Path:
    score = {"accuracy": 0.9, "n": 50, "ci95": [0.79, 0.96], "base_accuracy": 0.7, "delta": 20.0,
             "delta_ci95": [8.0, 31.0]}  # fmt: skip
    other = {**score, "accuracy": 0.6, "base_accuracy": 0.62, "delta": -2.0}
    path.write_text(json.dumps({
        "model": "m", "adapter": "a", "functions": {"ocr": score, "count": other},
        "questions": {"name": "built-in probes", "sha256": "ab" * 32},
        "manifest_sha256": file_sha256(folder / "manifest.json"), **changes,
    }))  # fmt: skip
    return path


# --- adapters and merged models --------------------------------------------------------------------


def test_a_pushed_adapter_names_its_base_by_commit_and_loads_back_with_plain_peft(
    hub: HubServer, hub_base: str, copy: Path, base_folder: Path, tmp_path: Path, reload_here: None
) -> None:
    from huggingface_hub import ModelCard, snapshot_download
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    profile = json.loads(json.dumps(VALUE))
    profile["model"].update(name_or_path="base", num_layers=3)
    remake(copy, **{"profile.json": profile, "train_log.jsonl": "{}"})
    export(ExportConfig(
        source=copy, output=tmp_path / "out", push_to_hub=REPO, base_model_id="org/base",
        scorecard=scorecard(copy, tmp_path / "scorecard.json"),
    ))  # fmt: skip
    files = hub.repos["models", REPO].files
    assert {"profile.png", "plan.json", "LICENSE", "manifest.json"} <= set(files)
    assert not set(files) & {"train_log.jsonl", ".vfl-run.json", "verification.json"}
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", hub_base)
    for name in ("plan.json", "profile.json"):
        assert json.loads(files[name])["model"]["name_or_path"] == "org/base"
    for name, content in files.items():
        assert str(base_folder.parent).encode() not in content and b"THIS_FOLDER" not in content, name

    head = head_of(files["README.md"].decode())
    assert (head["base_model"], head["base_model_relation"]) == ("org/base", "adapter")
    assert (head["library_name"], head["pipeline_tag"]) == ("peft", "image-text-to-text")
    assert (head["license"], head["license_name"], head["license_link"]) == (
        "other", "tiny-research", "LICENSE",
    )  # fmt: skip
    results = ModelCard(files["README.md"].decode()).data.eval_results
    assert {(r.dataset_config, r.metric_value) for r in results} == {("ocr", 0.9), ("count", 0.6)}
    text = files["README.md"].decode()
    assert "| ocr | 50 | 70.0% | 90.0% (79.0% to 96.0%) | +20.0 (+8.0 to +31.0) |" in text
    assert "| count | 50 | 62.0% |" in text and "-2.0" in text  # what was lost is shown as well
    assert "![Heat map" in text and "| seed | 0 |" in text and "tiny-research" in text
    for snippet in (f'"{REPO}"', f"vfl={REPO}", "vllm serve org/base", hub_base):
        assert snippet in text

    folder = Path(snapshot_download(REPO))
    assert verify_manifest(folder) == len(files) - 2  # the manifest itself and .gitattributes
    base = AutoModelForImageTextToText.from_pretrained(base_folder)
    ids = torch.arange(12)[None]
    before = base(input_ids=ids).logits
    loaded = PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=ids).logits
    again = AutoModelForImageTextToText.from_pretrained(base_folder)
    expected = PeftModel.from_pretrained(again, str(copy)).eval()(input_ids=ids).logits
    assert torch.equal(loaded, expected) and not torch.allclose(loaded, before, atol=1e-3)
    verify(
        VerifyConfig(folder=Path(shutil.copytree(folder, tmp_path / "v")), base=str(base_folder), samples=1)
    )


def test_a_pushed_merged_model_is_a_finetune_that_plain_transformers_loads(
    hub: HubServer, hub_base: str, adapter: Path, tmp_path: Path
) -> None:
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForImageTextToText

    merged = merge(MergeConfig(adapters=(str(adapter),), output=tmp_path / "m", device="cpu", pairs=0))
    export(ExportConfig(
        source=merged, output=tmp_path / "out", push_to_hub=REPO, base_model_id=f"org/base@{hub_base}"
    ))  # fmt: skip
    files = hub.repos["models", REPO].files
    head = head_of(files["README.md"].decode())
    assert (head["base_model"], head["base_model_relation"]) == ("org/base", "finetune")
    record = json.loads(files["merge.json"])
    assert (record["base"], record["revision"]) == ("org/base", hub_base)
    found = AutoModelForImageTextToText.from_pretrained(snapshot_download(REPO)).state_dict()
    kept = AutoModelForImageTextToText.from_pretrained(merged).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())


def test_a_base_that_is_a_folder_here_is_refused_with_the_way_out(
    hub: HubServer, adapter: Path, tmp_path: Path
) -> None:
    config = ExportConfig(source=adapter, output=tmp_path / "out", push_to_hub=REPO)
    with pytest.raises(ConfigError, match="--base-model-id"):
        export(config)
    assert hub.repos == {} and not (tmp_path / "out").exists()


def test_a_base_named_wrongly_is_noticed(
    hub: HubServer, hub_base: str, adapter: Path, tmp_path: Path
) -> None:
    files = {"model.safetensors": b"other weights", "config.json": b"{}"}
    hub.add("org/other", files)
    for name, said in {
        "org/other": "differ",
        "org/none": "no base model",
        f"org/base@{'0' * 40}": "no base",
    }.items():
        config = ExportConfig(source=adapter, output=tmp_path / "out", push_to_hub=REPO, base_model_id=name)
        with pytest.raises(ConfigError, match=said):
            export(config)
    assert ("models", REPO) not in hub.repos and not (tmp_path / "out").exists()


def test_the_bundled_model_is_no_base_on_the_hub(hub: HubServer, copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "adapter_config.json").read_text())
    remake(copy, **{"adapter_config.json": {**config, "base_model_name_or_path": "phantom"}})
    export(ExportConfig(source=copy, output=tmp_path / "out", push_to_hub=REPO))
    text = hub.repos["models", REPO].files["README.md"].decode()
    head = head_of(text)
    assert "base_model" not in head and head["license"] == "apache-2.0" and "comes with vfl-train" in text


def test_without_a_known_licence_none_is_claimed(copy: Path, tmp_path: Path) -> None:
    output = export(ExportConfig(source=copy, output=tmp_path / "out"))
    text = (output / "README.md").read_text()
    assert "license" not in head_of(text) and "could not be read" in text


def test_the_scorecard_must_be_of_these_weights(copy: Path, other_adapter: Path, tmp_path: Path) -> None:
    card = scorecard(other_adapter, tmp_path / "scorecard.json")
    config = ExportConfig(source=copy, output=tmp_path / "out", scorecard=card)
    with pytest.raises(ConfigError, match="other weights"):
        export(config)
    for broken in ({"functions": {}}, {"functions": {"ocr": {"accuracy": "high"}}}, {"questions": None}):
        scorecard(copy, card, **broken)
        with pytest.raises(ConfigError, match="scorecard"):
            export(config)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(
    hub: HubServer, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ExportConfig(
        source=copy, output=tmp_path / "out", push_to_hub=REPO, private=True, dry_run=True,
        base_model_id="org/base",
    )  # fmt: skip
    export(config)
    said = capsys.readouterr().out
    assert "adapter_model.safetensors" in said and f"to model repo {REPO}, private" in said
    assert "train_log" not in said and hub.asked == [] and not (tmp_path / "out").exists()


def test_running_the_same_command_again_pushes_again(
    hub: HubServer, hub_base: str, copy: Path, tmp_path: Path
) -> None:
    config = ExportConfig(source=copy, output=tmp_path / "out", push_to_hub=REPO, base_model_id="org/base")
    export(config)
    before = hub.repos["models", REPO].files
    del hub.repos["models", REPO]
    export(config)
    assert hub.repos["models", REPO].files == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"private": True}, "--private"), ({"push_to_hub": "tiny"}, "USER/NAME"),
        ({"push_to_hub": "a/b", "knockout": "k.json"}, "--knockout"), ({"base_model_id": "/a/b"}, "ORG/NAME"),
    ],
)  # fmt: skip
def test_contradicting_options_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ExportConfig(source=Path("a"), output=Path("b"), **changes)


# --- profiles and selections -----------------------------------------------------------------------


@pytest.fixture
def make_profile(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "org/base", own: bool = False) -> Path:
        value = json.loads(json.dumps(VALUE))
        value["model"]["name_or_path"] = name
        value["settings"] = {"own_probes": own}
        value["functions"]["ocr"]["examples"] = [{"question": "whose cat?", "answer_a": "mine"}]
        with RunFolder.open(tmp_path / f"p{own}", {"own": own}) as run:
            run.write_json("profile.json", value)
            with run.replacing("profile.png") as path:
                Image.new("RGB", (8, 8)).save(path)
            run.write_text("report.html", "<img src='data:private'>")
        return run.folder

    return make


def test_a_pushed_profile_is_read_by_its_name(
    hub: HubServer, hub_base: str, make_profile: Callable[..., Path], tmp_path: Path
) -> None:
    export(ExportConfig(source=make_profile(), output=tmp_path / "out", push_to_hub="team/profile"))
    repo = hub.repos["models", "team/profile"]
    assert set(repo.files) == {
        ".gitattributes", "README.md", "profile.json", "profile.png", "manifest.json",
    }  # fmt: skip
    assert repo.files["profile.png"] != (tmp_path / "pFalse" / "profile.png").read_bytes()  # drawn again
    for name in ("team/profile", "hub:team/profile"):
        profile = Profile.load(profile_file(name))
        assert (profile.model.name_or_path, profile.model.revision) == ("org/base", hub_base)
        assert profile.layers_of("ocr") == [1, 2]
    text = repo.files["README.md"].decode()
    assert "base_model" not in head_of(text)
    assert (
        "--profile team/profile " in text
        and "--functions ocr " in text
        and "| ocr | 20 of 20 | 1 | 1-2 | 1 |" in text
    )
    with pytest.raises(ConfigError, match="hub:owner/name"):
        profile_file("hub:../x")


def test_questions_of_own_probes_stay_here_unless_asked_for(
    make_profile: Callable[..., Path], tmp_path: Path
) -> None:
    for own, with_rows, there in ((True, False, False), (True, True, True), (False, False, True)):
        source, output = make_profile(own=own), tmp_path / f"out{own}{with_rows}"
        export(ExportConfig(source=source, output=output, with_rows=with_rows))
        assert ("whose cat?" in (output / "profile.json").read_text()) is there


def test_a_profile_of_a_local_model_is_not_published_under_its_path(
    hub: HubServer, hub_base: str, make_profile: Callable[..., Path], base_folder: Path, tmp_path: Path
) -> None:
    source = make_profile(str(base_folder))
    with pytest.raises(ConfigError, match="--base-model-id"):
        export(ExportConfig(source=source, output=tmp_path / "out", push_to_hub=REPO))
    export(ExportConfig(source=source, output=tmp_path / "out", push_to_hub=REPO, base_model_id="org/base"))
    for content in hub.repos["models", REPO].files.values():
        assert str(base_folder).encode() not in content


@pytest.fixture
def selection(tmp_path: Path) -> Path:
    record = {
        "schema_version": 1, "model": "org/base", "method": "vfl", "ablation": "block", "functions": ["ocr"],
        "layers": {"ocr": [1, 2]}, "data": {"format": "llava-jsonl", "sha256": "0" * 64, "rows_read": 2},
        "rows_kept": 2, "rows_selected": 1, "budget": {"asked": "0.5", "rows": 1, "filled": False},
        "buckets": {"ocr": {"rows": 2, "selected": 1}}, "seed": 0, "selected": "selected.jsonl",
    }  # fmt: skip
    with RunFolder.open(tmp_path / "selection", {"selection": 1}) as run:
        run.write_json("selection.json", record)
        with run.replacing("scores.parquet") as path:
            pq.write_table(pa.table({"uid": ["a", "b"], "row": [0, 1], "source": ["x", "y"]}), path)
        run.write_text("selected.jsonl", '{"id": "my own row"}\n')
        run.write_text("quarantine.jsonl", '{"detail": "my own row"}\n')
        run.write_text("report.html", "<p>my own row</p>")
    return run.folder


@pytest.mark.parametrize("with_rows", [False, True])
def test_a_selection_becomes_a_data_set_without_the_rows_unless_asked_for(
    hub: HubServer, hub_base: str, selection: Path, tmp_path: Path, with_rows: bool
) -> None:
    export(ExportConfig(source=selection, output=tmp_path / "out", push_to_hub=REPO, with_rows=with_rows))
    files = hub.repos["datasets", REPO].files
    own = {"selected.jsonl"} if with_rows else set()
    assert set(files) == {
        ".gitattributes", "README.md", "selection.json", "scores.parquet", "manifest.json", *own
    }  # fmt: skip
    assert any(b"my own row" in content for content in files.values()) is with_rows
    head = head_of(files["README.md"].decode())
    assert head["configs"] == [{"config_name": "scores", "data_files": "scores.parquet"}]
    assert json.loads(files["selection.json"])["revision"] == hub_base
    assert ("models", REPO) not in hub.repos


def test_a_home_path_in_a_parquet_column_or_a_picture_is_found(selection: Path, tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    pq.write_table(
        pa.table({"uid": ["a"], "source": ["/home/someone/data.json"]}), selection / "scores.parquet"
    )
    remake(selection, **{"scores.parquet": None})
    with pytest.raises(ConfigError, match=r"scores\.parquet"):
        export(ExportConfig(source=selection, output=tmp_path / "out", dry_run=True))
    from vfl_train.hub.privacy import find_secret_in_file

    info = PngInfo()
    info.add_text("Comment", "/home/someone/x", zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=info)
    assert b"someone" not in (tmp_path / "x.png").read_bytes()
    assert find_secret_in_file(tmp_path / "x.png") == "/home/someone/x"


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(json.dumps(VALUE))
    with pytest.raises(VerificationError, match=r"manifest\.json"):
        export(ExportConfig(source=tmp_path, output=tmp_path / "out"))


def test_profile_takes_a_profile_from_the_hub_if_it_is_of_this_model(
    hub: HubServer, base_folder: Path, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from vfl_train.cli import main

    value = json.loads(json.dumps(VALUE))
    config = json.loads((base_folder / "config.json").read_text())["text_config"]
    value["model"].update(num_layers=12, hidden_size=config["hidden_size"])
    for key in ("change_rate", "flip_rate"):
        value["functions"]["ocr"][key] = [0.1] * 12
    value["functions"]["ocr"].update(ci95=[[0, 1]] * 12, controls={})
    content = json.dumps(value).encode()
    hub.add("bob/profile", {"profile.json": content})
    odd = {**value, "drop_plan": {"ocr": {}}}
    hub.add("bob/odd", {"profile.json": json.dumps(odd).encode()})
    hub.add("bob/small", {"profile.json": json.dumps(VALUE).encode()})

    def take(repo: str) -> Any:
        options = [
            "--model",
            str(base_folder),
            "--profile",
            f"hub:bob/{repo}",
            "--output",
            str(tmp_path / repo),
        ]
        return CliRunner().invoke(main, ["profile", *options])

    done = take("profile")
    assert done.exit_code == 0 and "warning: this profile is of name_or_path" in done.stderr
    assert (tmp_path / "profile" / "profile.json").read_bytes() == content
    assert Image.open(tmp_path / "profile" / "profile.png").width > 300
    for repo, said in {"odd": "cannot be shown", "small": "num_layers 3", "none": "no repo"}.items():
        refused = take(repo)
        assert refused.exit_code == 2 and said in refused.stderr and refused.stderr.count("\n") <= 2
