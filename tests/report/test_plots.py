"""The pictures: drawn for every kind of profile, readable, and quickly."""

from __future__ import annotations

import io
import time
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from PIL import Image

from vfl_train.report.curves import curves_bytes, drop_bytes
from vfl_train.report.heatmap import heatmap_bytes, save_heatmap
from vfl_train.report.style import layer_ticks, short

SMALL, LARGE = (1000, 180), (2000, 2500)  # pixels


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert all(low <= size <= high for low, size, high in zip(SMALL, image.size, LARGE, strict=True))
    return image


def has(image: Image.Image, colour: str) -> bool:
    """Whether a good many pixels have `colour`."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(np.asarray(image.convert("RGB")).astype(int) - wanted).max(axis=2) <= 2).sum()) > 50


@pytest.mark.parametrize(("depth", "functions"), [(6, 1), (28, 6), (36, 3), (64, 8)])
def test_pictures_of_every_size(full_profile, tmp_path, depth, functions):
    profile = full_profile(functions, depth)
    start = time.process_time()
    save_heatmap(profile, tmp_path / "profile.png")
    assert time.process_time() - start < 8  # 1.2 s for the largest on one core
    both = opened((tmp_path / "profile.png").read_bytes())
    assert both.height > opened(heatmap_bytes(profile)).height + 200, "the curves stand below the map"
    assert opened(curves_bytes(profile)).height > 200 and opened(drop_bytes(profile)).height > 200


def test_the_flip_block_is_framed_and_the_peak_is_above_the_planted_mark(profile_of, function_of):
    framed = heatmap_bytes(profile_of({"ocr": function_of(6)}))
    assert has(opened(framed), "#d55e00")
    plain = profile_of({"ocr": replace(function_of(6), flip_block=[])})
    assert not has(opened(heatmap_bytes(plain)), "#d55e00")
    assert heatmap_bytes(plain, planted={"ocr": 2}) != heatmap_bytes(plain)


@pytest.mark.parametrize("intervention", ["swap", "drop", "drop-from"])
def test_pictures_of_every_intervention(profile_of, function_of, intervention):
    f = function_of(6)
    if intervention != "swap":
        f = replace(f, flip_rate=[], controls={}, flip_block=[], layers=[2])
    profile = profile_of({"ocr": f}, intervention=intervention)
    assert has(opened(heatmap_bytes(profile)), "#d55e00"), "a drop's layers are framed in its stead"
    assert opened(curves_bytes(profile))


def test_functions_that_are_not_measurable(profile_of, function_of, nothing, tmp_path):
    profile = profile_of({"ocr": nothing, "count": function_of(6)})
    save_heatmap(profile, tmp_path / "both.png", planted={"count": 2})
    assert opened((tmp_path / "both.png").read_bytes())
    alone = profile_of({"ocr": nothing})
    assert opened(heatmap_bytes(alone)) and curves_bytes(alone) == b"" and drop_bytes(alone) == b""
    save_heatmap(alone, tmp_path / "alone.png")
    assert (tmp_path / "alone.png").read_bytes() == heatmap_bytes(alone)
    few = replace(function_of(6), status="not_measurable", pairs_answered=7, peak_layer=None, flip_block=[])
    shown = opened(heatmap_bytes(profile_of({"ocr": few})))
    assert (
        shown.tobytes()
        == opened(heatmap_bytes(profile_of({"ocr": replace(nothing, pairs_answered=7)}))).tobytes()
    )
    assert curves_bytes(profile_of({"ocr": few})), "what was measured of few pairs is drawn with its interval"


def test_a_peak_below_the_floor_is_no_peak(profile_of, function_of):
    f = replace(function_of(6), peak_layer=None, layers=[])
    assert opened(heatmap_bytes(profile_of({"ocr": f})))


def test_names_are_no_formulas_and_fit(profile_of, function_of, recwarn):
    names = [r"/data/$x_{/\frac$", "模型\n\x07", "m" * 500]
    assert all(heatmap_bytes(profile_of({"f" * 90: function_of(6)}, name=n)) for n in names)
    assert not recwarn.list, "a letter that the font lacks"
    assert (
        short("模型\nx", 9) == "???x" and short("abcdefghij", 5) == "ab…ij" and short("abcde", 5) == "abcde"
    )


def test_the_users_settings_do_not_reach_the_pictures(profile_of, function_of):
    profile = profile_of({"ocr": function_of(6)})
    light = heatmap_bytes(profile)
    with matplotlib.rc_context():
        matplotlib.style.use("dark_background")
        assert heatmap_bytes(profile) == light
    assert opened(light).convert("RGB").getpixel((2, 2)) == (255, 255, 255)


def test_layers_are_numbered_from_0_with_room_between():
    assert list(layer_ticks(6, 40)) == [0, 1, 2, 3, 4, 5]
    assert list(layer_ticks(64, 40))[:3] == [0, 2, 4]
    assert all(len(layer_ticks(n, room)) <= room for n in range(1, 700) for room in (18, 40))
