"""A server that plays the Hub for the real huggingface_hub, and fails when it is told to.

It keeps repos as commits of files in memory and speaks the part of the Hub's HTTP interface that
huggingface_hub 2.4 uses to make a repo, upload through LFS (Xet must be off), commit, look and download.
Real Hub rules that matter here are kept: a commit appears whole or not at all, a commit that names an LFS
object which was never uploaded and a card with invalid metadata are refused, tokens are checked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import pytest
import yaml
from hub_state import LFS_SUFFIXES, HubServer, Repo

TOKEN = "hf_" + "Aa1" * 12  # what the server takes for alice's
_REPO = re.compile(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(/.*)?\Z")
_BASE_MODEL = re.compile(r"[\w.-]+(/[\w.-]+)?\Z")


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):  # the client was killed or gave up: what tests are about
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Silent."""

    def _serve(self) -> None:
        url = urlparse(self.path)
        path = unquote(url.path)
        self.hub.asked.append(f"{self.command} {path}")
        fault = self.hub.fault_for(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.cut is not None:
            self.rfile.read(min(fault.cut, length))
            fault.reached.set()
            self.close_connection = True
            return
        body = self._chunked() if self.headers.get("Transfer-Encoding") else self.rfile.read(length)
        if fault is not None and fault.hang:
            fault.reached.set()
            fault.released.wait(30)
            self.close_connection = True
            return
        if fault is not None and fault.status is not None:
            self._answer(fault.status, {"error": "planted"}, fault.headers)
            return
        status, value, headers = self._route(path, parse_qs(url.query), body)
        if fault is not None and fault.lost:
            self.close_connection = True
            return
        self._answer(status, value, headers)

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    def _chunked(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _answer(self, status: int, value: Any, headers: dict[str, str]) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if not isinstance(value, bytes):
            self.send_header("Content-Type", "application/json")
        for key, text in headers.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # --- what is asked for -------------------------------------------------------------------------

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any, dict[str, str]]:
        signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path.startswith("/lfs/"):  # signed addresses of the store: no token
            return self._store(path.removeprefix("/lfs/"), body)
        if self.headers.get("Authorization") and not signed_in:
            return 401, {"error": "Invalid credentials"}, {
                "X-Error-Message": "Invalid credentials in Authorization header"
            }  # fmt: skip
        if path == "/api/whoami-v2":
            token = {"displayName": "test", "role": self.hub.role}
            return (200 if signed_in else 401), {
                "type": "user", "name": "alice", "orgs": [{"name": "team"}],
                "auth": {"type": "access_token", "accessToken": token},
            }, {}  # fmt: skip
        if path == "/api/repos/create":
            return self._create(json.loads(body), signed_in)
        if path == "/api/validate-yaml":
            errors = metadata_errors(json.loads(body)["content"])
            return (400 if errors else 200), {"errors": [{"message": e} for e in errors], "warnings": []}, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        found = _REPO.match(path)
        if found:
            return self._api(found[1], found[2], found[3] or "", body, signed_in)
        if "/resolve/" in path:
            return self._resolve(path, signed_in)
        return 404, {"error": f"no such page {path}"}, {}

    def _create(self, asked: dict[str, Any], signed_in: bool) -> tuple[int, Any, dict[str, str]]:
        repo, kind = f"{asked['organization'] or 'alice'}/{asked['name']}", f"{asked.get('type', 'model')}s"
        if not signed_in or repo.partition("/")[0] not in ("alice", "team"):
            return 403, {"error": "forbidden"}, {}
        there = (kind, repo) in self.hub.repos
        if not there:
            self.hub.repos[kind, repo] = Repo(asked.get("visibility") == "private")
            self.hub.repos[kind, repo].commit({".gitattributes": b""})
        prefix = "datasets/" if kind == "datasets" else ""
        return (409 if there else 200), {"url": f"{self.hub.url}/{prefix}{repo}"}, {}

    def _batch(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        objects = []
        for entry in asked["objects"]:
            known = entry["oid"] in self.hub.objects
            upload = {"href": f"{self.hub.url}/lfs/{entry['oid']}?signature=s3cr3tsignature"}
            verify = {"href": f"{self.hub.url}/lfs/verify"}
            objects.append(entry if known else {**entry, "actions": {"upload": upload, "verify": verify}})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _store(self, name: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if name == "verify":
            return (200 if json.loads(body)["oid"] in self.hub.objects else 404), {}, {}
        if hashlib.sha256(body).hexdigest() != name:
            return 400, {"error": "the content is not that of its name"}, {}
        self.hub.objects[name] = body
        return 200, b"", {"ETag": '"1"'}

    def _api(
        self, kind: str, name: str, rest: str, body: bytes, signed_in: bool
    ) -> tuple[int, Any, dict[str, str]]:
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not signed_in):
            return 401 if not signed_in else 404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"}
        action, _, revision = rest.strip("/").partition("/")
        if action in ("preupload", "commit") and not signed_in:
            return 403, {"error": "forbidden"}, {}
        if action == "preupload":
            asked = json.loads(body)["files"]
            return 200, {"files": [_mode(repo, entry) for entry in asked]}, {}
        if action == "commit":
            return self._commit(kind, name, repo, body)
        files = repo.at(revision or "main")
        if files is None:
            return 404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"}
        entries = [_entry(repo, path, content) for path, content in sorted(files.items())]
        if action == "tree":
            return 200, entries, {}
        if action == "paths-info":
            wanted = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
            return 200, [entry for entry in entries if entry["path"] in wanted], {}
        siblings = [
            {"rfilename": e["path"], "size": e["size"], "blobId": e["oid"], "lfs": e.get("lfs")}
            for e in entries
        ]
        sha = repo.sha if revision in ("", "main") else revision
        card = _metadata(files.get("README.md", b"").decode())
        return 200, {
            "id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings,
            "tags": [], "downloads": 0, "likes": 0, "cardData": card,
        }, {}  # fmt: skip

    def _commit(self, kind: str, name: str, repo: Repo, body: bytes) -> tuple[int, Any, dict[str, str]]:
        files = dict(repo.files)
        lfs = set(repo.lfs)
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return 400, {"error": "LFS object was not uploaded"}, {}
                files[value["path"]] = self.hub.objects[value["oid"]]
                lfs.add(value["path"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        repo.lfs = lfs
        if self.hub.spoil in files:
            files[self.hub.spoil] += b"?"
        sha = repo.commit(files)
        return (
            200,
            {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True},
            {},
        )

    def _resolve(self, path: str, signed_in: bool) -> tuple[int, Any, dict[str, str]]:
        head, _, tail = path.strip("/").partition("/resolve/")
        kind, name = ("datasets", head[9:]) if head.startswith("datasets/") else ("models", head)
        revision, _, file = tail.partition("/")
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not signed_in):
            return 404, {}, {"X-Error-Code": "RepoNotFound"}
        files = repo.at(revision)
        if files is None:
            return 404, {}, {"X-Error-Code": "RevisionNotFound"}
        if file not in files:
            return 404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.sha}
        sha = repo.sha if revision == "main" else revision
        oid = _entry(repo, file, files[file])["oid"]
        return 200, files[file], {"ETag": f'"{oid}"', "X-Repo-Commit": sha}


def _git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(repo: Repo, path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_blob(content)}
    if path in repo.lfs:
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 130}
    return entry


def _mode(repo: Repo, entry: dict[str, Any]) -> dict[str, Any]:
    path = entry["path"]
    large = path.endswith(LFS_SUFFIXES)
    there = repo.files.get(path)
    oid = None
    if there is not None:
        oid = hashlib.sha256(there).hexdigest() if large else _git_blob(there)
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


def _metadata(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    value = yaml.safe_load(match[1]) if match else {}
    return value if isinstance(value, dict) else {}


def metadata_errors(card: str) -> list[str]:
    """Some of the Hub's rules for a card's metadata."""
    try:
        value = _metadata(card)
    except yaml.YAMLError:
        return ["invalid YAML"]
    errors = []
    bases = value.get("base_model")
    for base in bases if isinstance(bases, list) else [bases] if bases is not None else []:
        if not _BASE_MODEL.match(str(base)):
            errors.append(f'"base_model" with value "{base}" is not valid')
    if value.get("base_model_relation") not in (None, "adapter", "finetune", "merge", "quantized"):
        errors.append('"base_model_relation" is not valid')
    if value.get("license") == "other" and not value.get("license_name"):
        errors.append('"license_name" is required for the license "other"')
    for result in [r for model in value.get("model-index") or [] for r in model["results"]]:
        if not result.get("task", {}).get("type") or not {"type", "name"} <= result.get("dataset", {}).keys():
            errors.append('"model-index" is not valid')
    return errors


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A Hub on a port of this machine, until the block ends."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        for fault in hub.faults:
            fault.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def environment_of(hub: HubServer, home: Path) -> dict[str, str]:
    """Environment of a fresh process that talks to `hub`."""
    return {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }  # fmt: skip


def talk_to(hub: HubServer, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Have the huggingface_hub of this process talk to `hub`, with alice's token. It reads its settings when
    it is imported, so they are changed where they ended up."""
    from huggingface_hub import close_session, constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False,
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    close_session()
