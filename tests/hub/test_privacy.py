"""No token and no home path leaves the machine: not in an artefact, not in a log."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image
from small_profile import VALUE

from vfl_train.hub.origin import dataset_id
from vfl_train.hub.privacy import (
    find_secret,
    find_secret_in_file,
    public_name,
    public_values,
    without_secrets,
)

TOKENS = ("hf_" + "Qx7" * 12, "sk-" + "Zy8" * 14)
PLAIN = "correct-horse-battery"  # no known form: found because its variable is called a secret
# Train, say what would be pushed, export: one process, as three command lines.
RUN = """
import sys
from vfl_train.cli import main
lines = [
    ["lora", "--config", "recipe.yaml", "--output", "adapter"],
    ["export", "adapter", "--output", "dry", "--dry-run", "--push-to-hub", "a/x", "--base-model-id", "o/b"],
    ["export", "adapter", "--output", "export"],
]
for line in lines:
    try:
        main(line)
    except SystemExit as e:
        if e.code:
            raise
"""
RECIPE = """
model: {home}/base
lora:
  data: {home}/{token}/rows.jsonl
  image_root: {home}/{token}
  profile: {home}/{token}/profile.json
  functions: [ocr]
  device: cpu
  max_steps: 1
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
"""


def plant(home: Path, base_folder: Path) -> None:
    """A base, a recipe and data whose places and rows hold tokens and the home folder's path."""
    data = home / TOKENS[0]
    data.mkdir(parents=True)
    shutil.copytree(base_folder, home / "base")
    Image.new("RGB", (56, 56), "red").save(data / "0.png")
    turns = [
        {"from": "human", "value": f"<image>Is {TOKENS[1]} in {home}/x?"},
        {"from": "gpt", "value": TOKENS[0]},
    ]
    good = {"id": TOKENS[1], "image": "0.png", "conversations": turns}
    bad = {**good, "image": f"{home}/elsewhere/{TOKENS[1]}.png"}
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (good, good, bad)))
    profile = json.loads(json.dumps(VALUE))
    profile["model"].update(
        name_or_path=str(home / "base"), model_type="qwen2_5_vl", num_layers=12,
        hidden_size=json.loads((base_folder / "config.json").read_text())["text_config"]["hidden_size"],
    )  # fmt: skip
    for key in ("change_rate", "flip_rate"):
        profile["functions"]["ocr"][key] = [0.1] * 12
    profile["functions"]["ocr"].update(ci95=[[0, 1]] * 12, controls={})
    (data / "profile.json").write_text(json.dumps(profile))
    (home / "recipe.yaml").write_text(RECIPE.format(home=home, token=TOKENS[0]))


def holders(folder: Path, *secrets: str) -> set[str]:
    """Files with one of `secrets` anywhere in their bytes, also where a picture has them compressed."""
    found = set()
    for path in (p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        if path.suffix == ".png":
            content += _inflated(content)
        if any(secret.encode() in content for secret in secrets):
            found.add(path.name)
    return found


def _inflated(png: bytes) -> bytes:
    """The compressed chunks of a PNG, inflated."""
    out, at = b"", 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        if kind == b"zTXt":
            out += zlib.decompress(body.split(b"\0", 1)[1][1:])
        at += 12 + length
    return out


def test_training_and_exporting_leak_nothing(tmp_path: Path, base_folder: Path) -> None:
    home = tmp_path / "home" / "alice"
    plant(home, base_folder)
    environment = {
        **os.environ, "HOME": str(home), "HF_TOKEN": TOKENS[0], "OPENAI_API_KEY": TOKENS[1],
        "WANDB_API_KEY": PLAIN, "HF_HOME": str(tmp_path / "cache"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=home, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    secrets = (*TOKENS, PLAIN, str(home))
    assert not [s for s in secrets if s in done.stdout + done.stderr]
    assert "adapter_model.safetensors" in done.stdout and not (home / "dry").exists()
    assert holders(home / "export", *secrets) == set()
    names = {p.name for p in (home / "export").iterdir()}
    assert {"README.md", "profile.png", "profile.json", "train_config.yaml", "LICENSE"} & names >= {
        "README.md", "profile.png", "profile.json", "train_config.yaml",
    }  # fmt: skip
    assert not names & {"train_log.jsonl", "quarantine.jsonl"}
    # What stays here may name the base's folder, without which the adapter cannot be loaded again, and
    # quotes the rows that were refused; nothing else of it does.
    assert holders(home / "adapter", *TOKENS, PLAIN) <= {"quarantine.jsonl"}
    assert holders(home / "adapter", str(home)) <= {
        "adapter_config.json",
        ".vfl-run.json",
        "quarantine.jsonl",
    }


@pytest.mark.parametrize(
    "text",
    [*TOKENS, "ghp_" + "a" * 36, "AKIA" + "B" * 16, 'api_key: "abcdefghijklmnopqrst"',
     "/home/u/x", "C:\\Users\\u\\x", '"C:\\\\Users\\\\u"', "/root/x"],  # allow: bait
)  # fmt: skip
def test_what_looks_like_a_secret_is_found(text: str, tmp_path: Path) -> None:
    found = find_secret(f"see {text} there")
    assert found and len(found) < 20
    (tmp_path / "x.json").write_text(f'{{"a": "{text}"}}'.replace("/", "\\/"))
    assert find_secret_in_file(tmp_path / "x.json")


def test_secrets_of_the_environment_are_known_by_their_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_DB_PASSWORD", PLAIN)
    monkeypatch.setenv("SSH_TOKEN_FILE", "/etc/motd-of-this-host")  # a path is no secret
    monkeypatch.setenv("MAX_TOKENS", "8192")
    assert find_secret(f"x{PLAIN}y") and PLAIN not in (find_secret(f"x{PLAIN}y") or "")
    assert without_secrets(f"{PLAIN} {TOKENS[0]} fine") == "*** *** fine"
    assert find_secret("/etc/motd-of-this-host and 8192 tokens") is None


def test_vocabularies_may_hold_paths_and_safetensors_metadata_may_not(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "tokenizer.json").write_text('{"/home/user": 5}')  # allow: bait
    assert find_secret_in_file(tmp_path / "tokenizer.json") is None
    (tmp_path / "tokenizer.json").write_text(json.dumps({TOKENS[0]: 5}))
    assert find_secret_in_file(tmp_path / "tokenizer.json")
    folder = "/home/user/run"  # allow: bait
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"from": folder})
    assert find_secret_in_file(tmp_path / "x.safetensors") == folder


def test_names_are_cut_where_they_say_where_things_lie() -> None:
    assert public_name("../models/m") == "m" and public_name("C:\\models\\m") == "m"
    assert public_name("org/name") == "org/name" and public_name("data/rows.jsonl") == "data/rows.jsonl"
    assert public_values({"/": [1, "~/x"]}) == {"/": [1, "x"]}


def test_only_data_of_the_hub_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dataset_id("org/data") == dataset_id("hub:org/data@main/train/*.parquet") == "org/data"
    assert dataset_id("data/rows.jsonl") is None and dataset_id("/a/b") is None and dataset_id("rows") is None
    (tmp_path / "org" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert dataset_id("org/data") is None
