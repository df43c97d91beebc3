"""What must not leave the machine in a file that is meant to be shared: its paths, and tokens."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

# Hugging Face, OpenAI-style, GitHub, AWS and Weights & Biases-like credentials.
_SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b"
    r"|(?i:api_?key|password|secret)['\"]?\s*[:=]\s*['\"][^'\"\s]{16,}"
)
_HOMES = re.compile(r"(?:/(?:home|Users|root)/|[A-Z]:\\{1,2}Users\\)[^\s\"'<>]+")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
_MIN_SECRET = 12  # characters; shorter values of such variables are no secrets, and would be found anywhere
# Vocabularies are not prose: "/home/" is a word in some of them. They are searched for tokens only.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")


def public_name(name: str | None) -> str | None:
    """A model or file name fit for a public file: of a path that says where this machine keeps things
    (absolute, of Windows, or up from here) only its last part, and no token."""
    if name is None:
        return None
    path, windows = Path(name).expanduser(), PureWindowsPath(name)
    if path.is_absolute() or ".." in path.parts:
        name = path.name
    elif windows.drive:
        name = windows.name
    return without_secrets(name)


def public_values(value: Any) -> Any:
    """`value` (JSON-like, with paths) as plain JSON with every absolute path cut to its last part."""
    if isinstance(value, dict):
        return {str(k): public_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [public_values(v) for v in value]
    if isinstance(value, str | Path):
        return public_name(str(value))
    return value


def without_secrets(text: str) -> str:
    """`text` with every token in it blotted out: for messages that quote a server or a library."""
    for secret in _own_secrets():
        text = text.replace(secret, "***")
    return _SECRETS.sub("***", text)


def for_the_terminal(text: str) -> str:
    """A message as it may be shown, and pasted elsewhere: without tokens, the home folder written as ~."""
    home = _own_home()
    return without_secrets(text.replace(home, "~/") if home else text)


def find_secret(text: str, paths: bool = True) -> str | None:
    """The first few characters of a token, or (with `paths`) the first path of a home, in `text`; or None.
    Values of this process's environment whose names say that they are secret count as tokens."""
    match = _SECRETS.search(text)
    found = match[0] if match else next((s for s in _own_secrets() if s in text), None)
    if found:
        return f"{found[:6]}..."
    home = _HOMES.search(text) if paths else None
    if home:
        return home[0]
    own = _own_home()
    return own if paths and own and own in text else None


def _own_secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _MIN_SECRET and not value.startswith(("/", "~")):
            yield value


def _own_home() -> str | None:
    """The home folder with a closing slash; None where it is too short to mean anything."""
    home = str(Path.home())
    return f"{home}/" if home.count("/") > 1 else None


def find_secret_in_file(path: Path) -> str | None:
    """`find_secret` over a whole file: the text of text files, of a safetensors file its header (names and
    metadata; the rest is numbers), of a picture its text chunks too, of a parquet file its metadata and every
    column of text."""
    if path.suffix == ".safetensors":
        return find_secret(_safetensors_header(path))
    if path.suffix == ".parquet":
        return _first(_parquet_texts(path))
    if path.suffix == ".png":
        return _first(_png_texts(path))
    text = path.read_bytes().decode("utf-8", errors="replace")
    # JSON may write a slash as \/ and a letter as \u0068.
    texts = [text, text.replace("\\/", "/")]
    return _first(texts, paths=path.name not in _VOCABULARIES)


def _first(texts: Iterable[str], paths: bool = True) -> str | None:
    return next(filter(None, (find_secret(text, paths) for text in texts)), None)


def _safetensors_header(path: Path) -> str:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(length).decode("utf-8", errors="replace")


def _png_texts(path: Path) -> Iterator[str]:
    from PIL import Image

    yield path.read_bytes().decode("latin-1")
    with Image.open(path, formats=("PNG",)) as image:
        image.load()  # text after the pixels counts too; compressed text is inflated
        yield from (str(value) for value in getattr(image, "text", {}).values())


def _parquet_texts(path: Path) -> Iterator[str]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield " ".join(str(v) for kv in (file.schema_arrow.metadata or {}).items() for v in kv)
        for batch in file.iter_batches(batch_size=4096):
            yield "\n".join(
                str(value)
                for column in batch.columns
                if not _is_number(column.type)
                for value in column.to_pylist()
            )


def _is_number(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))
