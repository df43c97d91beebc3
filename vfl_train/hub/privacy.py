"""What must not leave the machine in a file that is meant to be shared: its paths, and tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# Hugging Face, OpenAI-style, GitHub, AWS and Weights & Biases-like credentials.
_SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b"
    r"|(?i:api_?key|password|secret)['\"]?\s*[:=]\s*['\"][^'\"\s]{16,}"
)
_HOMES = re.compile(r"(?:/(?:home|Users|root)/|[A-Z]:\\Users\\)[^\s\"']+")


def public_name(name: str | None) -> str | None:
    """A model or file name fit for a public file: of an absolute path only its last part."""
    if name is None:
        return None
    path = Path(name).expanduser()
    return path.name if path.is_absolute() else name


def public_values(value: Any) -> Any:
    """`value` (JSON-like, with paths) as plain JSON with every absolute path cut to its last part."""
    if isinstance(value, dict):
        return {str(k): public_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [public_values(v) for v in value]
    if isinstance(value, str | Path):
        return public_name(str(value))
    return value


def find_secret(text: str) -> str | None:
    """The first few characters of a token or the first home path in `text`, or None."""
    match = _SECRETS.search(text)
    if match:
        return f"{match[0][:6]}..."
    home = _HOMES.search(text)
    return home[0] if home else None
