"""Profiles travel: from a folder, a file or a Hub repo, and nothing in them is trusted.

The Hub here is a server of this process, which the real huggingface_hub of a fresh one talks to: it reads
HF_ENDPOINT when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner
from small_profile import VALUE

from vfl_train.cli import main
from vfl_train.errors import ConfigError, HubError
from vfl_train.hub import load
from vfl_train.hub.load import load_profile, profile_file
from vfl_train.schemas import MAX_PROFILE_BYTES, Profile

COMMIT = "c" * 40
# What the fresh process runs: load every name, print what came of it.
LOAD = """
import json, sys
from vfl_train.errors import VflError
from vfl_train.hub.load import load_profile
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = load_profile(name).functions["ocr"].flip_block
    except VflError as e:
        found[name] = [type(e).__name__, str(e)]
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    """`alice/profiled` has a profile.json, `alice/empty` none, `alice/huge` one that is too large and
    `alice/odd` one that is no profile; there is no other repo. `asked` are the requests."""

    asked: ClassVar[list[str]]
    files: ClassVar[dict[str, bytes]] = {
        "alice/profiled": json.dumps(VALUE).encode(),
        "alice/huge": b" " * (MAX_PROFILE_BYTES + 1),
        "alice/odd": b'{"schema_version": 1}',
    }

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        repo, _, name = self.path.strip("/").partition("/resolve/")
        content = self.files.get(repo) if name.endswith("/profile.json") else None
        self.send_response(200 if content is not None else 404)
        if content is None:
            known = repo in self.files or repo == "alice/empty"
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        else:
            self.send_header("ETag", f'"{hash(content) & 0xFFFFFFFF:08x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if body and content:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Silent."""


@pytest.fixture
def hub() -> Iterator[str]:
    """Address of a running Hub."""
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def load_elsewhere(tmp_path: Path, names: list[str], **environment: str) -> dict[str, Any]:
    """What `load_profile` makes of `names` in a fresh process with its own empty cache."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1", **environment},
    )  # fmt: skip
    return json.loads(done.stdout)


def test_a_profile_on_the_hub_is_fetched_alone_and_once(tmp_path, hub):
    names = ["alice/profiled", "alice/empty", "alice/huge", "alice/odd", "bob/none", "bob/typo.json"]
    found = load_elsewhere(tmp_path, names, HF_ENDPOINT=hub)
    assert found["alice/profiled"] == [1, 2]
    for name, said in {
        "alice/empty": "has no profile.json at its root", "alice/huge": "no profile is that large",
        "alice/odd": "does not follow the profile contract", "bob/none": "the Hub has no repo bob/none",
        "bob/typo.json": "does not exist",
    }.items():  # fmt: skip
        kind, message = found[name]
        assert kind == "ConfigError" and said in message and "\n" not in message, name
    asked = [line for line in Hub.asked if "/alice/" in line or "/bob/" in line]
    assert all(line.endswith("/profile.json") for line in asked)
    fetched = [line for line in asked if line.startswith("GET")]
    assert fetched == [f"GET /alice/{r}/resolve/main/profile.json" for r in ("profiled", "odd")]
    # Again without a network: from the cache; what was never fetched cannot be reached.
    found = load_elsewhere(tmp_path, ["alice/profiled", "bob/none"], HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    assert found["alice/profiled"] == [1, 2]
    kind, message = found["bob/none"]
    assert kind == "HubError" and "no file or folder bob/none" in message and "cannot be reached" in message


@pytest.mark.parametrize(
    "command",
    [["plan"], ["lora", "--functions", "ocr", "--data", "d.json", "--output", "o"],
     ["select", "--data", "d.json", "--output", "o"]],
)  # fmt: skip
def test_commands_take_a_repo_for_profile(monkeypatch, tmp_path, command):
    asked = []

    def away(repo):
        asked.append(repo)
        raise HubError("the Hub is away")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "_fetch_profile", away)
    model = [] if command == ["plan"] else ["--model", "phantom"]
    result = CliRunner().invoke(main, [*command, *model, "--profile", "alice/profiled"])
    assert result.exit_code == 8 and result.stderr == "error: the Hub is away\n"
    assert asked == ["alice/profiled"]


def test_paths_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "alice" / "profiled"
    folder.mkdir(parents=True)
    (folder / "profile.json").write_text(json.dumps(VALUE), encoding="utf-8")
    for name in ("alice/profiled", "alice/profiled/profile.json", str(folder)):
        assert profile_file(name).is_file() and load_profile(name).layers_of("ocr") == [1, 2]
    for name in ("nowhere", "a/b/c", "/nowhere/profile", "../up"):
        with pytest.raises(ConfigError, match="does not exist"):
            load_profile(name)


def changed(path: tuple[str, ...], value: object) -> dict[str, Any]:
    """The profile with one key set (or, for ..., taken away)."""
    copy = json.loads(json.dumps(VALUE))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy


OCR = ("functions", "ocr")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 2), (("model",), ...), (("model",), []), (("model", "num_layers"), "3"),
        (("model", "num_layers"), True), (("model", "num_layers"), 0), (("model", "name_or_path"), ["x"]),
        (("model", "revision"), 3), (("intervention",), "patch"), (("phase",), {}), (("path",), "fast"),
        (("versions",), []), (("seed",), "0"), (("functions",), []), (("functions",), {"../x": {}}),
        (OCR, "ok"), ((*OCR, "status"), "fine"), ((*OCR, "pairs"), -1), ((*OCR, "pairs"), "many"),
        ((*OCR, "change_rate"), [0.1]), ((*OCR, "change_rate"), "abc"), ((*OCR, "change_rate"), [0, 2, 0]),
        ((*OCR, "flip_rate"), [0, float("nan"), 0]), ((*OCR, "flip_rate"), [0, "1", 0]),
        ((*OCR, "ci95"), [[0, 1], [0, 1], [0]]), ((*OCR, "ci95"), {}), ((*OCR, "controls"), []),
        ((*OCR, "controls"), {"self": [1]}), ((*OCR, "peak_layer"), 3), ((*OCR, "peak_layer"), "1"),
        ((*OCR, "layers"), [-1]), ((*OCR, "flip_block"), [1.0]), ((*OCR, "flip_block"), {"1": 1}),
        ((*OCR, "details"), 1), ((*OCR, "examples"), ["x"]), ((*OCR, "examples"), 7),
        ((*OCR, "flip_block"), ...),
    ],
)  # fmt: skip
def test_a_profile_that_breaks_its_contract_is_refused_in_one_sentence(tmp_path, path, value):
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(changed(path, value)), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        Profile.load(file)
    assert str(file) in caught.value.message and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "9" * 5000, "\x00", '{"a": 1'])
def test_what_is_no_json_is_refused(tmp_path, text):
    (tmp_path / "profile.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="is not"):
        Profile.load(tmp_path)


def test_a_file_too_large_is_not_read(tmp_path):
    (tmp_path / "profile.json").write_bytes(b" " * (MAX_PROFILE_BYTES + 1))
    with pytest.raises(ConfigError, match="no profile is that large"):
        Profile.load(tmp_path)
