"""Images: where they may lie (R8), what is decoded and how (R7), and that nothing is fetched (R9)."""

from __future__ import annotations

import os
import resource
import struct
import sys
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vfl_train.data.images import RejectedImage, open_image, resolve_image, verify_image
from vfl_train.data.readers import read_dataset
from vfl_train.data.rows import ImageRef, Reason

SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


def ref(data: bytes) -> ImageRef:
    return ImageRef(None, data, "zoo")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), kind)


def png_header(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A PNG that claims a size and holds hardly any data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


BAD = {
    "truncated jpeg": (noise("JPEG")[:900], Reason.image_truncated),
    "truncated png": (noise("PNG")[:900], Reason.image_truncated),
    "truncated webp": (noise("WEBP")[:900], Reason.image_truncated),
    "empty": (b"", Reason.image_unreadable),
    "html": (b"<!DOCTYPE html><html>404</html>", Reason.image_format),
    "svg": (SVG, Reason.image_format),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", Reason.image_format),
    "gif": (encoded(Image.new("P", (9, 9)), "GIF"), Reason.image_format),
    "tiff": (encoded(Image.new("RGB", (9, 9)), "TIFF"), Reason.image_format),
    "144 megapixels": (png_header(12_000, 12_000), Reason.image_too_large),
    "400 megapixels": (png_header(20_000, 20_000), Reason.image_too_large),
    "51 megapixels": (png_header(10_200, 5_000), Reason.image_too_large),
    "10000 x 1": (encoded(Image.new("RGB", (10_000, 1)), "PNG"), Reason.image_shape),
    "jpeg of garbage": (b"\xff\xd8\xff" + b"\x00" * 300, Reason.image_unreadable),
    "png of garbage": (b"\x89PNG\r\n\x1a\n" + b"\x00" * 300, Reason.image_unreadable),
    "webp of garbage": (b"RIFF\x20\x00\x00\x00WEBPVP8 " + b"\x00" * 300, Reason.image_unreadable),
    "corrupt png": (png_header(64, 64, b"not zlib"), Reason.image_unreadable),
}


# Test runners reset the filter that images.py sets; 51 megapixels are below Pillow's own limit.
@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("use", [open_image, verify_image])
def test_zoo_of_bad_images(name, use):
    data, code = BAD[name]
    started, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RejectedImage) as caught:
        use(ref(data))
    assert caught.value.code == code
    assert caught.value.exit_code == 3 and "0x" not in caught.value.message
    assert time.perf_counter() - started < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200 * 1024  # KiB


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", ["51 megapixels", "144 megapixels", "10000 x 1"])
def test_size_is_checked_before_decoding(name, monkeypatch):
    decoded = []
    monkeypatch.setattr("vfl_train.data.images._decode", lambda *args: decoded.append(args))
    for use in (open_image, verify_image):
        with pytest.raises(RejectedImage):
            use(ref(BAD[name][0]))
    assert not decoded


RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
GOOD = {
    "jpeg": noise("JPEG"),
    "png": noise("PNG"),
    "webp": noise("WEBP"),
    "cmyk": encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"),
    "rgba": encoded(Image.new("RGBA", (8, 8), (1, 2, 3, 4)), "PNG"),
    "palette": encoded(Image.new("P", (8, 8)), "PNG"),
    "bilevel": encoded(Image.new("1", (8, 8)), "PNG"),
    "grey and alpha": encoded(Image.new("LA", (8, 8)), "PNG"),
    "animated png": encoded(RED, "PNG", save_all=True, append_images=[BLUE]),
    "animated webp": encoded(RED, "WEBP", save_all=True, append_images=[BLUE]),
    "1 x 1": encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
    "200 x 1": encoded(Image.new("RGB", (200, 1), "red"), "PNG"),
    "text behind the image": noise("PNG") + b"<html>",
    "broken exif": encoded(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", GOOD)
def test_zoo_of_good_images(name):
    verify_image(ref(GOOD[name]))
    image = open_image(ref(GOOD[name]))
    assert image.mode == "RGB" and min(image.size) >= 1
    if name.startswith("animated"):
        assert image.getpixel((4, 4))[0] > 200 > 60 > image.getpixel((4, 4))[2]


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    image = open_image(ref(encoded(Image.fromarray(values), "PNG")))
    assert [image.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    from PIL import ImageOps

    pixels = Image.fromarray(np.random.default_rng(1).integers(0, 255, (16, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(pixels, "JPEG", exif=exif, quality=95)
    expected = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    assert np.array_equal(np.asarray(open_image(ref(data))), np.asarray(expected))


@pytest.fixture
def hostile(image_root: Path, tmp_path: Path) -> dict[str, Reason]:
    """Paths that lead out of the root, or to what is not an image file."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(GOOD["png"])
    (tmp_path / "images-of-others").mkdir()
    (tmp_path / "images-of-others" / "x.png").write_bytes(GOOD["png"])
    (image_root / "out.png").symlink_to(secret)
    (image_root / "outside").symlink_to(tmp_path)
    (image_root / "device.png").symlink_to("/dev/zero")
    (image_root / "loop.png").symlink_to("loop.png")
    os.mkfifo(image_root / "pipe.png")
    outside, remote, missing = Reason.image_outside_root, Reason.remote_image, Reason.image_missing
    return {
        str(secret): outside,
        str(image_root / "a.png"): outside,
        "../secret.png": outside,
        "sub/../a.png": outside,
        "sub/../../secret.png": outside,
        "..\\secret.png": outside,
        "C:\\secret.png": outside,
        "\\\\host\\share.png": outside,
        "//host/share.png": outside,
        "../images-of-others/x.png": outside,
        "a.png\0.txt": outside,
        "out.png": outside,
        "outside/secret.png": outside,
        "device.png": outside,
        "/dev/zero": outside,
        "/proc/self/environ": outside,
        ".": outside,
        "": missing,
        "loop.png": missing,
        "none.png": missing,
        "a.png/b.png": missing,
        "~/secret.png": missing,
        "\uff0e\uff0e/secret.png": missing,
        "\u2024\u2024/secret.png": missing,
        "x" * 300: missing,
        "x/" * 3000: missing,
        "sub": Reason.image_not_a_file,
        "pipe.png": Reason.image_not_a_file,
        "http://169.254.169.254/latest/meta-data": remote,
        "HTTPS://example.org/a.png": remote,
        " https://example.org/a.png": remote,
        "ftp://example.org/a.png": remote,
        "file:///etc/passwd": remote,
        "s3://bucket/a.png": remote,
        "data:image/png;base64,AAAA": remote,
    }


def test_hostile_paths_have_exact_reasons(hostile, image_root):
    for value, code in hostile.items():
        with pytest.raises(RejectedImage) as caught:
            resolve_image(value, image_root)
        assert caught.value.code == code, value
        assert caught.value.message.isprintable()


def test_nothing_outside_the_root_is_opened_or_fetched(hostile, image_root, make_row, write_jsonl, audit):
    rows = [make_row(0)]
    for number, value in enumerate(hostile, start=1):
        rows.append({**make_row(number), "image": value})
    path = write_jsonl(rows)
    read_dataset(write_jsonl(rows[:1], "warm.jsonl"), image_root)  # lazy imports open files of their own
    with audit.record("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen") as events:
        dataset = read_dataset(path, image_root)
    assert [row.row for row in dataset.rows] == [0] and len(dataset.rejected) == len(hostile)
    assert {event for event, _ in events} == {"open"}
    opened = {
        os.path.realpath(args[0]) for _, args in events if isinstance(args[0], str | bytes | os.PathLike)
    }
    allowed = (str(image_root) + os.sep, str(path), sys.prefix, sys.base_prefix)
    assert {name for name in opened if not name.startswith(allowed)} == set()
    assert str(image_root / "a.png") in opened


def test_links_inside_the_root_are_followed(image_root):
    (image_root / "link.png").symlink_to("sub/c.jpg")
    found = resolve_image("link.png", image_root)
    assert found.path == (image_root / "sub" / "c.jpg").resolve() and found.label == "link.png"
    assert resolve_image("sub//./c.jpg", image_root).path == found.path
    alias = image_root.parent / "alias"
    alias.symlink_to(image_root)
    assert resolve_image("sub/c.jpg", alias).path == found.path


def test_file_replaced_by_a_pipe_does_not_hang(image_root):
    found = resolve_image("a.png", image_root)
    (image_root / "a.png").unlink()
    os.mkfifo(image_root / "a.png")
    with pytest.raises(RejectedImage) as caught:
        open_image(found)
    assert caught.value.code == Reason.image_not_a_file


def test_value_must_be_a_string(image_root):
    with pytest.raises(RejectedImage) as caught:
        resolve_image({"bytes": None}, image_root)
    assert caught.value.code == Reason.wrong_type
