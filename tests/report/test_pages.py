"""Pages load nothing and run nothing, whatever the texts in them are; pictures of every kind of profile."""

from __future__ import annotations

import io
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from vfl_train.functions.probes import LoadedPair, ProbeSet
from vfl_train.options import format_layers
from vfl_train.report.heatmap import heatmap_bytes, save_heatmap
from vfl_train.report.pages import function_rows, page, profile_page, thumbnail, tiles
from vfl_train.schemas import FunctionProfile, ModelInfo, ProbePair, Profile

EVIL = '<script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(1)>"\'&{{ 7 * 7 }}'
DEPTH = 6


def measured(peak: int = 2, block: tuple[int, ...] = (2, 3)) -> FunctionProfile:
    rates = [0.9 if k == peak else 0.1 for k in range(DEPTH)]
    controls = {"self": [0.0] * DEPTH, "nuisance": [0.05] * DEPTH, "unrelated": [0.5] * DEPTH, "noise": []}
    return FunctionProfile(
        "ok", 50, 40, rates, rates, [[0.1, 0.9]] * DEPTH, controls, peak, [peak], list(block), False
    )


NOTHING = FunctionProfile("not_measurable", 50, 3, [], [], [], {}, None, [], [], False)


def profile_of(functions: dict[str, FunctionProfile], name: str = "m", intervention: str = "swap") -> Profile:
    info = ModelInfo(name, None, "qwen2_5_vl", DEPTH, 64)
    probe_set = {"name": "builtin", "sha256": "0"}
    return Profile(info, intervention, "text", "reference", "float32", 0, {}, probe_set, functions)


def probes_of(*names: str, text: str = "what ?") -> ProbeSet:
    image = Image.new("RGB", (300, 200), "red")
    return ProbeSet(
        "p",
        "0",
        {n: [LoadedPair(1, ProbePair(n, "a", "b", text, text, "B"), image, image)] * 5 for n in names},
    )


class Scan(HTMLParser):
    """What a browser would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]
        self.handlers += [key for key, _ in attrs if key.startswith("on")]


def check_self_contained(text: str) -> Scan:
    found = Scan(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {*found.tags}
    assert found.sources and all(s.startswith("data:image/png;base64,") for s in found.sources)
    assert not found.handlers and "url(" not in text and "@import" not in text
    return found


def select_page(text: str) -> str:
    shown = tiles([(Image.new("RGB", (64, 64)), text, text, text), (None, text, text, text)])
    bucket = dict.fromkeys(("name", "rows", "share", "picked", "picked_share"), text)
    return page(
        "select.html", text, text, facts=[(text, text)], buckets=[bucket], picked=shown, rejected=shown,
        quarantine=[(text, 3)],
    )  # fmt: skip


def demo_page(text: str) -> str:
    profile = profile_of({"ocr": measured()})
    shown = tiles([(Image.new("RGB", (64, 64)), text, text, text)])
    bucket = dict.fromkeys(("name", "rows", "share", "picked", "picked_share"), text)
    score = dict.fromkeys(("name", "n", "before", "after", "delta", "tone", "interval"), text)
    return page(
        "demo.html", text, text, facts=[(text, text)], heatmap=thumbnail(Image.new("RGB", (8, 8))),
        functions=function_rows(profile), buckets=[bucket], picked=shown, rejected=shown, scores=[score],
        checks=[{"name": text, "detail": text, "passed": True}], times=[(text, text)], disclaimer=text,
    )  # fmt: skip


PAGES = {
    "profile": lambda text: profile_page(profile_of({"ocr": measured()}, text), probes_of("ocr", text=text)),
    "select": select_page,
    "demo": demo_page,
}


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_self_contained_and_escape_what_comes_from_outside(name):
    text = PAGES[name](EVIL)
    plain = check_self_contained(PAGES[name]("plain"))
    assert check_self_contained(text).tags == plain.tags, "the text made an element of its own"
    assert "<script" not in text and "&lt;script&gt;" in text and "{{ 7 * 7 }}" in text


def test_the_profile_page_shows_what_was_found():
    profile = profile_of({"ocr": measured(), "count": NOTHING})
    text = profile_page(profile, probes_of("ocr", "count"), examples=2)
    for piece in ("40/50", "90.0 % (10-90)", "2-3", "count (not measurable)", "3/50", "reference path"):
        assert piece in text
    assert Scan(text).tags.count("img") == 1 + 2 * 2 * 2


@pytest.mark.parametrize("intervention", ["swap", "drop", "drop-from"])
def test_heat_maps_of_every_intervention(intervention):
    dropped = replace(measured(), flip_rate=[], controls={}, flip_block=[])
    profile = profile_of(
        {"ocr": measured() if intervention == "swap" else dropped}, intervention=intervention
    )
    assert Image.open(io.BytesIO(heatmap_bytes(profile))).format == "PNG"
    assert function_rows(profile)[0]["flipped"] == ("90.0 %" if intervention == "swap" else "-")


def test_heat_map_of_a_function_that_is_not_measurable(tmp_path):
    profile = profile_of({"ocr": NOTHING, "count": measured()})
    save_heatmap(profile, tmp_path / "both.png", planted={"count": 2})
    assert Image.open(tmp_path / "both.png").size[0] > 500
    assert heatmap_bytes(profile_of({"ocr": NOTHING}))
    row = function_rows(profile)[0]
    assert row["name"] == "ocr (not measurable)" and {row["peak"], row["layers"], row["self"]} == {"-"}


def test_a_model_name_is_no_formula():
    assert heatmap_bytes(profile_of({"ocr": measured()}, name=r"/data/$x_{/$y\frac$"))


def test_ranges_of_layers():
    assert format_layers([7, 2, 3, 4]) == "2-4,7"
    assert format_layers([]) == "-"


def test_long_texts_and_large_images_are_cut():
    (shown,) = tiles([(Image.new("RGB", (4000, 100)), "q" * 500, "a" * 500, "n")])
    assert len(shown["question"]) <= 121 and len(shown["answer"]) <= 121 and len(shown["image"]) < 5000
