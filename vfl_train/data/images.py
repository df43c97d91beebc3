"""Images of untrusted rows: where they may lie, and how they are decoded.

A path is taken under the image root only and never fetched; a file is opened only if it is a regular
one, by Pillow's JPEG, PNG and WEBP decoders only, and decoded only after its size is known to be sane.

What is not covered: the decoders themselves run unprotected in this process.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from vfl_train.data.rows import ImageBytes, ImageRef, Reason, RowError, one_line
from vfl_train.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000
MAX_BYTES = 256 * 1024**2  # of one encoded file
MAX_ASPECT = 200  # longer side over shorter; Qwen processors refuse more
MAX_PATH_CHARS = 4096

# Pillow warns where a size is suspicious and goes on. Here a suspicious size is an error, always.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

_URL = re.compile(r"\s*(?:[A-Za-z][A-Za-z0-9+.\-]*://|data:)", re.IGNORECASE)
_CUT = re.compile(r"truncated|unexpected end", re.IGNORECASE)  # in Pillow's messages
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class RejectedImage(RowError):
    """An image that cannot be used, with its reason code."""


def resolve_image(
    value: object, image_root: str | os.PathLike, store: str | os.PathLike | None = None
) -> ImageRef:
    """The image that a row names, as a file under `image_root`; one inside the data file is left as it is.

    Opens nothing. Links are followed, and must end under the root, or in the folder `store` (the Hub's cache
    keeps the files of a snapshot elsewhere).

    Raises:
        RejectedImage: not a relative path, outside the root, a URL, missing, or not a regular file.
    """
    if isinstance(value, ImageRef):
        return value
    if not isinstance(value, str):
        raise RejectedImage(Reason.wrong_type, "the image is not named by a string")
    label = one_line(value, 120)
    _refuse_path(value, label)
    root = os.path.realpath(image_root)
    real = os.path.realpath(os.path.join(root, value))
    fences = [root] if store is None else [root, os.path.realpath(store)]
    if not any(real.startswith(os.path.join(fence, "")) for fence in fences):
        raise RejectedImage(Reason.image_outside_root, f"{label} leads out of the image root")
    try:
        mode = os.stat(real).st_mode
    except FileNotFoundError as error:
        raise RejectedImage(Reason.image_missing, f"{label} is not there") from error
    except OSError as error:
        raise RejectedImage(Reason.image_missing, f"{label} cannot be found: {_errno(error)}") from error
    if not stat.S_ISREG(mode):
        raise RejectedImage(Reason.image_not_a_file, f"{label} is not a regular file")
    return ImageRef(path=Path(real), data=None, label=label)


def open_image(ref: ImageRef) -> Image.Image:
    """Decode an image fully: RGB, upright by its EXIF orientation, the first frame of an animation.

    Transparency is dropped and 16-bit grey keeps its upper 8 bits.

    Raises:
        RejectedImage: it cannot be read, is too large (checked before decoding) or of another format.
    """
    with _opened(ref) as image:
        _decode(image, ref)
        return _upright(_rgb(image), image)


def image_size(ref: ImageRef) -> tuple[int, int]:
    """Width and height in pixels, upright, from the header only. Raises RejectedImage."""
    with _opened(ref) as image:
        width, height = image.size
        try:
            orientation = image.getexif().get(_ORIENTATION)
        except Exception:  # as in _upright
            orientation = None
        return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def encoded_bytes(ref: ImageRef) -> bytes:
    """The image as it is stored, to copy it. Raises RejectedImage if it cannot be read or is too large."""
    with _stream(ref) as stream:
        data = stream.read(MAX_BYTES + 1)
    _check_head(data[:16], len(data), ref)
    return data


def verify_image(ref: ImageRef) -> None:
    """Check that `open_image` will succeed. JPEGs are read whole but decoded at reduced size.

    Raises:
        RejectedImage: as `open_image`.
    """
    with _opened(ref) as image:
        if image.format == "JPEG":
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
        _decode(image, ref)


def _refuse_path(value: str, label: str) -> None:
    """Refuse what can be told from the string alone."""
    if _URL.match(value):
        raise RejectedImage(Reason.remote_image, f"{label} is a URL; images are never fetched")
    if not value.strip():
        raise RejectedImage(Reason.image_missing, "the image path is empty")
    if len(value) > MAX_PATH_CHARS:
        raise RejectedImage(Reason.image_missing, f"an image path of {len(value)} characters")
    outside = (
        value.startswith(("/", "\\"))
        or "\0" in value
        or _DRIVE.match(value) is not None
        or ".." in re.split(r"[\\/]", value)
    )
    if outside:
        detail = f"{label} is not a plain relative path (absolute, `..` or NUL)"
        raise RejectedImage(Reason.image_outside_root, detail)


@contextmanager
def _opened(ref: ImageRef) -> Iterator[Image.Image]:
    """The image with its header read and its size checked, nothing decoded yet."""
    with _stream(ref) as stream:
        head = stream.read(16)
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        _check_head(head, size, ref)
        try:
            image = Image.open(stream, formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            detail = f"{ref.label} has far more than {MAX_PIXELS} pixels"
            raise RejectedImage(Reason.image_too_large, detail) from error
        except UnidentifiedImageError as error:
            raise RejectedImage(Reason.image_unreadable, f"{ref.label} has a broken header") from error
        except Exception as error:  # decoders raise anything on hostile input; all of it means "unreadable"
            raise _broken(ref, error) from error
        with image:
            _check_size(image.size, ref)
            yield image


def _stream(ref: ImageRef) -> BinaryIO:
    if ref.data is not None:
        return BytesIO(ref.data)
    if ref.member is not None:
        return BytesIO(_read_member(ref.member, ref.label))
    if ref.path is None:
        raise RejectedImage(Reason.image_missing, f"{ref.label} has neither a path nor data")
    try:
        # O_NONBLOCK: should a FIFO have taken the file's place since, opening it must not wait.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        stream = os.fdopen(os.open(ref.path, flags), "rb")
    except FileNotFoundError as error:
        raise RejectedImage(Reason.image_missing, f"{ref.label} is not there") from error
    except OSError as error:
        raise RejectedImage(Reason.image_unreadable, f"{ref.label}: {_errno(error)}") from error
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise RejectedImage(Reason.image_not_a_file, f"{ref.label} is not a regular file")
    return stream


def _read_member(member: ImageBytes, label: str) -> bytes:
    try:
        return member.read()
    except RejectedImage:
        raise
    except RowError as error:
        raise RejectedImage(error.code, error.detail) from error
    except (DataError, OSError, MemoryError) as error:
        detail = f"{label} cannot be read from the data file ({type(error).__name__})"
        raise RejectedImage(Reason.image_unreadable, detail) from error


def _check_head(head: bytes, size: int, ref: ImageRef) -> None:
    """Tell a file of another kind, and one that was cut, before a decoder sees it."""
    if size == 0:
        raise RejectedImage(Reason.image_unreadable, f"{ref.label} is an empty file")
    if size > MAX_BYTES:
        raise RejectedImage(Reason.image_too_large, f"{ref.label} has {size} bytes, at most {MAX_BYTES}")
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    if not (webp or head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))):
        raise RejectedImage(Reason.image_format, f"{ref.label} is not a {', '.join(FORMATS)} file")
    if webp and size < int.from_bytes(head[4:8], "little") + 8:  # Pillow cannot tell cut from broken here
        raise RejectedImage(Reason.image_truncated, f"{ref.label} ends too early")


def _check_size(size: tuple[int, int], ref: ImageRef) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        detail = f"{ref.label} is {width} x {height}, more than {MAX_PIXELS} pixels"
        raise RejectedImage(Reason.image_too_large, detail)
    if min(size) < 1 or max(size) > MAX_ASPECT * min(size):
        detail = f"{ref.label} is {width} x {height}, an aspect ratio above {MAX_ASPECT}"
        raise RejectedImage(Reason.image_shape, detail)


def _decode(image: Image.Image, ref: ImageRef) -> None:
    try:
        image.load()
    except Exception as error:  # as in _opened
        raise _broken(ref, error) from error


def _broken(ref: ImageRef, error: Exception) -> RejectedImage:
    """Cut or corrupt. Pillow's own text stays out: it may hold absolute paths and object addresses."""
    if isinstance(error, EOFError) or _CUT.search(str(error)):
        return RejectedImage(Reason.image_truncated, f"{ref.label} ends too early")
    return RejectedImage(Reason.image_unreadable, f"{ref.label} is corrupt ({type(error).__name__})")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips everything above 255 to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _upright(pixels: Image.Image, source: Image.Image) -> Image.Image:
    try:
        orientation = source.getexif().get(_ORIENTATION)
    except Exception:  # a broken EXIF block says nothing about orientation; viewers show the pixels as stored
        orientation = None
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return pixels if turn is None else pixels.transpose(turn)


def _errno(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()
