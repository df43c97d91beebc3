"""Finished folders that tests change."""

from __future__ import annotations

import json
from pathlib import Path

from vfl_train.runs import file_sha256


def remade(folder: Path, name: str | None = None, text: str = "") -> None:
    """Replace a file of a finished folder (or take it as it is now) as if it had been written this way."""
    if name is not None:
        (folder / name).write_text(text)
    value = json.loads((folder / "manifest.json").read_text())
    for file, entry in value["files"].items():
        entry.update(sha256=file_sha256(folder / file), bytes=(folder / file).stat().st_size)
    (folder / "manifest.json").write_text(json.dumps(value))
