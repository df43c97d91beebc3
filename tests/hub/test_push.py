"""Pushing to the Hub: the real huggingface_hub against a server that plays the Hub and fails on demand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from hub_server import TOKEN, HubServer, environment_of

from vfl_train.errors import ConfigError, HubError, VerificationError, VflError
from vfl_train.hub import retry
from vfl_train.hub.push import hub_api, push_folder
from vfl_train.runs import RunFolder

REPO = "alice/tiny"
COMMIT = r"/api/models/alice/tiny/commit/main"
# One push in a process of its own: for the tests that kill it.
PUSH = """
import sys
from pathlib import Path
from vfl_train.errors import VflError
from vfl_train.hub.push import hub_api, push_folder
try:
    print(push_folder(hub_api(sys.argv[2]), Path(sys.argv[1]), sys.argv[2], "adapter"))
except VflError as e:
    sys.exit(e.exit_code)
"""

# The same under the handlers of the command line.
PUSH_COMMAND = """
import sys
from pathlib import Path
from vfl_train.hub.push import hub_api, push_folder
group = MainGroup()
@group.command()
def push():
    push_folder(hub_api(sys.argv[2]), Path(sys.argv[1]), sys.argv[2], "adapter")
group.main(["push"])
"""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited between attempts."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished folder with a small and a large file, and things that must not leave."""
    return make_folder(tmp_path / "out")


def make_folder(path: Path, **more: str) -> Path:
    with RunFolder.open(path, {"test": 1}) as run:
        run.write_text("README.md", "---\nlicense: mit\n---\n# Tiny\n")
        run.write_text("adapter_config.json", "{}\n")
        header = b"{}      "
        run.write_bytes(
            "adapter_model.safetensors", len(header).to_bytes(8, "little") + header + b"\1" * 4096
        )
        for name, text in more.items():
            run.write_text(name, text)
    (path / "verification.json").write_text("{}")
    return path


def push(folder: Path, **options: bool) -> str:
    return push_folder(hub_api(REPO), folder, REPO, "adapter", **options)


def refused(call: Callable[[], object], kind: type[VflError] = HubError) -> VflError:
    """The error of `call`, which must be one sentence without the token or an address."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and TOKEN not in text and "signature" not in text and "127.0.0.1" not in text
    return caught.value


def test_a_folder_arrives_whole_in_one_commit_and_nothing_else_does(hub: HubServer, folder: Path) -> None:
    url = push(folder)
    repo = hub.repos["models", REPO]
    assert set(repo.files) == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json",
    }  # fmt: skip
    for name in set(repo.files) - {".gitattributes"}:
        assert repo.files[name] == (folder / name).read_bytes()
    assert len(repo.commits) == 2 and repo.sha in url and not repo.private
    assert hub.count("PUT", "/lfs/") == 1


def test_a_second_push_of_the_same_makes_no_commit_and_of_less_removes_the_rest(
    hub: HubServer, tmp_path: Path
) -> None:
    push(make_folder(tmp_path / "first", **{"plan.json": "{}"}))
    repo = hub.repos["models", REPO]
    repo.commit({**repo.files, "mine.txt": b"by hand"})
    commits = len(repo.commits)
    push(tmp_path / "first")
    assert len(repo.commits) == commits and hub.count("PUT", "/lfs/") == 1
    push(make_folder(tmp_path / "second"))
    assert "plan.json" not in repo.files and repo.files["mine.txt"] == b"by hand"


def test_private_repos_are_made_private_and_public_ones_are_refused(hub: HubServer, folder: Path) -> None:
    push(folder, private=True)
    assert hub.repos["models", REPO].private
    hub.add(REPO, {})
    error = refused(lambda: push(folder, private=True), ConfigError)
    assert "public" in error.message and hub.count("POST", COMMIT) == 1


def test_a_repo_of_another_kind_is_left_alone(hub: HubServer, folder: Path) -> None:
    hub.add(REPO, {"config.json": b"{}", "model.safetensors": b"x"})
    error = refused(lambda: push(folder), ConfigError)
    assert "merged" in error.message and hub.count("PUT", "/lfs/") == 0


# --- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/whoami-v2"), ("POST", "/api/repos/create"), ("POST", "/preupload/"),
        ("POST", "/objects/batch"), ("PUT", "/lfs/"), ("POST", "/lfs/verify"), ("POST", COMMIT),
        ("POST", "/paths-info/"), ("POST", "/api/validate-yaml"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", [{"status": 500}, {"status": 503}, {"cut": 10}], ids=["500", "503", "cut"])
def test_failures_that_pass_are_ridden_out(
    hub: HubServer, folder: Path, waits: list[float], method: str, path: str, how: dict
) -> None:
    fault = hub.fail(method, path, times=2, **how)
    push(folder)
    assert fault.times == 0 and waits[:2] == [1.0, 2.0]
    repo = hub.repos["models", REPO]
    assert len(repo.commits) == 2 and "manifest.json" in repo.files


@pytest.mark.parametrize(("method", "path"), [("POST", "/preupload/"), ("POST", COMMIT), ("GET", "whoami")])
def test_the_server_says_how_long_to_wait(
    hub: HubServer, folder: Path, waits: list[float], method: str, path: str
) -> None:
    hub.fail(method, path, times=2, status=429, headers={"Retry-After": "7"})
    push(folder)
    assert len(waits) == 2 and all(7 <= w <= 8 for w in waits)


@pytest.mark.parametrize(("method", "path"), [("POST", "/preupload/"), ("PUT", "/lfs/"), ("POST", COMMIT)])
def test_a_wait_without_end_is_not_waited(
    hub: HubServer, folder: Path, waits: list[float], method: str, path: str
) -> None:
    hub.fail(method, path, times=99, status=429, headers={"Retry-After": "86400"})
    error = refused(lambda: push(folder))
    assert "86400 seconds" in error.message and waits == []


@pytest.mark.parametrize(
    ("method", "path", "how"),
    [
        ("POST", COMMIT, {"status": 500}), ("PUT", "/lfs/", {"status": 500}), ("PUT", "/lfs/", {"cut": 100}),
        ("POST", "/preupload/", {"status": 429}), ("POST", "repos/create", {"status": 502}),
    ],
)  # fmt: skip
def test_failures_that_stay_end_after_a_few_attempts_with_nothing_shown(
    hub: HubServer, folder: Path, waits: list[float], method: str, path: str, how: dict
) -> None:
    fault = hub.fail(method, path, times=99, **how)
    error = refused(lambda: push(folder))
    assert error.exit_code == 8 and "again" in error.fix
    assert 99 - fault.times <= 6 and sum(waits) < 60
    repo = hub.repos.get(("models", REPO))
    assert repo is None or len(repo.commits) == 1
    fault.times = 0
    push(folder)  # the same command, later
    assert "manifest.json" in hub.repos["models", REPO].files


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("GET", "whoami", 401, "does not accept the token"), ("POST", "repos/create", 401, "token"),
        ("POST", "repos/create", 403, "no right"), ("POST", "/preupload/", 403, "no right"),
        ("POST", COMMIT, 403, "no right"), ("PUT", "/lfs/", 403, "no right"),
    ],
)  # fmt: skip
def test_refusals_are_not_tried_again(
    hub: HubServer, folder: Path, waits: list[float], method: str, path: str, status: int, said: str
) -> None:
    fault = hub.fail(method, path, times=99, status=status)
    error = refused(lambda: push(folder))
    assert error.exit_code == 8 and said in error.message and "hf auth login" in error.fix
    assert fault.times == 98 and waits == []


def test_a_server_that_never_answers_is_given_up(
    hub: HubServer, folder: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "TIMEOUT", httpx2.Timeout(0.1))
    hub.fail("POST", COMMIT, times=99, hang=True)
    error = refused(lambda: push(folder))
    assert "does not answer" in error.message and len(waits) == retry.ATTEMPTS - 1


def test_a_commit_whose_answer_was_lost_is_not_made_twice(
    hub: HubServer, folder: Path, waits: list[float]
) -> None:
    hub.fail("POST", COMMIT, lost=True)
    push(folder)
    repo = hub.repos["models", REPO]
    assert len(repo.commits) == 2 and hub.count("POST", COMMIT) == 1


def test_a_repo_that_then_holds_something_else_is_noticed(hub: HubServer, folder: Path) -> None:
    hub.spoil = "README.md"
    assert "README.md" in refused(lambda: push(folder)).message


def test_the_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch, folder: Path, waits: list[float]) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "broke" in refused(lambda: push(folder)).message


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ConnectionResetError("reset by peer"), "broke"), (TimeoutError("slow"), "does not answer"),
        (PermissionError("token expired"), "no right"), (RuntimeError(f"bad {TOKEN}\nmore"), "bad ***"),
    ],
)  # fmt: skip
def test_failures_of_uploads_by_xet_are_one_sentence_too(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str
) -> None:
    """Xet itself cannot be played here; its errors are Python's own."""
    from huggingface_hub import HfApi

    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(HfApi, "preupload_lfs_files", fail)
    error = refused(lambda: push(folder))
    assert said in error.message and error.exit_code == 8


def test_offline_mode_is_named(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline" in refused(lambda: push(folder)).message.lower()


def test_an_interrupted_push_ends_at_once_by_contract(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    (folder / "verification.json").unlink()
    environment = {**os.environ, **environment_of(hub, tmp_path / "home")}
    fault = hub.fail("PUT", "/lfs/", hang=True)
    script = f"import click\nfrom vfl_train.cli.main_group import MainGroup\n{PUSH_COMMAND}"
    process = subprocess.Popen([sys.executable, "-c", script, str(folder), REPO], env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert fault.reached.wait(60)
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 143 and "terminated" in said and "Traceback" not in said
    assert list(hub.repos["models", REPO].files) == [".gitattributes"]


# --- tokens, secrets, changed files ----------------------------------------------------------------


def test_without_a_token_the_way_to_one_is_named(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    error = refused(lambda: hub_api(REPO))
    assert "hf auth login" in error.fix and hub.asked == []


def test_a_token_that_cannot_do_it_is_refused_before_anything_is_sent(hub: HubServer, folder: Path) -> None:
    hub.role = "read"
    assert "only read" in refused(lambda: hub_api(REPO)).message
    hub.role = "write"
    assert "alice" in refused(lambda: hub_api("bob/tiny")).message
    hub_api("team/tiny")
    assert set(hub.asked) == {"GET /api/whoami-v2"}


def test_a_wrong_token_is_refused(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "z" * 30)
    assert "hf auth login" in refused(lambda: hub_api(REPO)).fix


def test_neither_changed_files_nor_secrets_are_sent(hub: HubServer, tmp_path: Path) -> None:
    changed = make_folder(tmp_path / "changed")
    (changed / "README.md").write_text("other")
    refused(lambda: push(changed), VerificationError)
    error = refused(
        lambda: push(make_folder(tmp_path / "s", **{"plan.json": '"/home/someone/x"'})), ConfigError
    )
    assert "plan.json" in error.message
    assert hub.repos == {}


def test_invalid_metadata_is_refused_by_the_hub_in_one_sentence(hub: HubServer, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "x", **{"README.md": "---\nbase_model: /a/b/c d\n---\n"})
    assert "base_model" in refused(lambda: push(folder)).message
    assert len(hub.repos["models", REPO].commits) == 1


# --- killed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), [("PUT", "/lfs/"), ("POST", COMMIT)], ids=["upload", "commit"])
def test_a_push_that_was_killed_completes_when_run_again(
    hub: HubServer, folder: Path, tmp_path: Path, method: str, path: str
) -> None:
    environment = {**os.environ, **environment_of(hub, tmp_path / "home")}
    command = [sys.executable, "-c", PUSH, str(folder), REPO]
    fault = hub.fail(method, path, hang=True)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert fault.reached.wait(60)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    fault.released.set()
    repo = hub.repos["models", REPO]
    assert list(repo.files) == [".gitattributes"]  # nobody sees half a model
    uploaded = len(hub.objects)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert repo.files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert len(repo.commits) == 2 and TOKEN not in done.stdout + done.stderr
    # What had arrived before the kill was not sent again.
    assert hub.count("PUT", "/lfs/") == (1 if uploaded else 2)
    assert set(json.loads(repo.files["manifest.json"])["files"]) < set(repo.files)
