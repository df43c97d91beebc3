"""What the server that plays the Hub holds: repos as commits of files in memory, and the failures to come."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass, field
from typing import Any

LFS_SUFFIXES = (".safetensors", ".png", ".parquet", ".bin")


@dataclass
class Fault:
    """Requests of `method` whose path matches `path` fail, the first `times` of them after `after` that pass.

    `status`: that answer, with `headers`. `cut`: the connection is closed after `cut` bytes of the body.
    `hang`: no answer until `released` is set. `lost`: the request is carried out, the answer is not sent."""

    method: str
    path: str
    times: int = 1
    after: int = 0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    hang: bool = False
    lost: bool = False
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


@dataclass
class Repo:
    """`commits`: (sha, files) from the first on; files map a path to its content."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    lfs: set[str] = field(default_factory=set)  # paths stored by LFS

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    @property
    def sha(self) -> str:
        return self.commits[-1][0]

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits.append((sha, files))
        return sha

    def at(self, revision: str) -> dict[str, bytes] | None:
        if revision == "main":
            return self.files
        return next((files for sha, files in self.commits if sha == revision), None)


class HubServer:
    """State of the Hub. `asked` are the requests in order, as `METHOD /path`."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.asked: list[str] = []
        self.role = "write"
        self.spoil = ""  # a file that every commit stores wrongly
        self.url = ""

    def add(self, repo: str, files: dict[str, bytes], kind: str = "models", private: bool = False) -> Repo:
        """A repo with one commit."""
        made = self.repos[kind, repo] = Repo(private)
        made.commit({".gitattributes": b""})
        made.commit({".gitattributes": b"", **files})
        made.lfs = {name for name in files if name.endswith(LFS_SUFFIXES)}
        return made

    def fail(self, method: str, path: str, **how: Any) -> Fault:
        """Have matching requests fail; see `Fault`."""
        fault = Fault(method, path, **how)
        self.faults.append(fault)
        return fault

    def count(self, method: str, path: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(path, line)) for line in self.asked if line.startswith(method + " "))

    def fault_for(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method and re.search(fault.path, path):
                if fault.after > 0:
                    fault.after -= 1
                elif fault.times > 0:
                    fault.times -= 1
                    return fault
        return None
