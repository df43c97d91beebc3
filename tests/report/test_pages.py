"""Pages load nothing and run nothing, whatever the texts in them are, and say what a profile holds."""

from __future__ import annotations

import shlex
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from vfl_train.config import ProfileConfig
from vfl_train.options import format_layers
from vfl_train.report.pages import control_rows, function_rows, page, profile_page, thumbnail, tiles
from vfl_train.report.tables import command, drop_rows, findings, interaction_rows, interaction_summary

EVIL = '<script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(1)>"\'&{{ 7 * 7 }}'
SECTIONS = {
    "Functions and their layers", "Layer by layer", "Controls", "Example pairs",
    "From which layer on the image is not needed", "Do the blocks of different functions interact?",
    "Did training move the layers?", "Cost", "How to repeat it",
}  # fmt: skip
ALWAYS = {"Functions and their layers", "How to repeat it"}


class Scan(HTMLParser):
    """What a browser would load or run, the headings, and the text between the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.handlers: list[str] = []
        self.headings: set[str] = set()
        self.pieces: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]
        self.handlers += [key for key, _ in attrs if key.startswith("on")]

    def handle_data(self, data):
        self.pieces.append(data)
        if self.tags and self.tags[-1] == "h2" and data.strip():
            self.headings.add(data)


def check_self_contained(text: str) -> Scan:
    found = Scan(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "a"} & {*found.tags}
    assert found.sources and all(s.startswith("data:image/png;base64,") for s in found.sources)
    assert not found.handlers and "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text
    return found


@pytest.fixture
def page_of(full_profile, profile_of, function_of, probes_of):
    """The page of a kind with `text` wherever a text from outside can stand."""

    def profile(text: str) -> str:
        return profile_page(full_profile(text=text, name=text), probes_of("ocr", "count", text=text))

    def select(text: str) -> str:
        shown = tiles([(Image.new("RGB", (64, 64)), text, text, text), (None, text, text, text)])
        bucket = dict.fromkeys(("name", "rows", "share", "picked", "picked_share"), text)
        return page(
            "select.html", text, text, facts=[(text, text)], buckets=[bucket], picked=shown, rejected=shown,
            by_function="data:image/png;base64,", by_source=None, doubted=shown, flags=[(text, text, 2)],
            quarantine=[(text, 3)],
        )  # fmt: skip

    def demo(text: str) -> str:
        profile = profile_of({"ocr": function_of(6)})
        shown = tiles([(Image.new("RGB", (64, 64)), text, text, text)])
        bucket = dict.fromkeys(("name", "rows", "share", "picked", "picked_share"), text)
        score = dict.fromkeys(("name", "n", "before", "after", "delta", "tone", "interval"), text)
        return page(
            "demo.html", text, text, facts=[(text, text)], heatmap=thumbnail(Image.new("RGB", (8, 8))),
            functions=function_rows(profile), controls=control_rows(profile), buckets=[bucket], picked=shown,
            rejected=shown, scores=[score], checks=[{"name": text, "detail": text, "passed": True}],
            times=[(text, text)], disclaimer=text,
        )  # fmt: skip

    return {"profile": profile, "select": select, "demo": demo}


@pytest.mark.parametrize("kind", ["profile", "select", "demo"])
def test_pages_are_self_contained_and_escape_what_comes_from_outside(page_of, kind):
    text = page_of[kind](EVIL)
    plain = check_self_contained(page_of[kind]("plain"))
    assert check_self_contained(text).tags == plain.tags, "the text made an element of its own"
    assert "<script" not in text and "&lt;script&gt;" in text and "{{ 7 * 7 }}" in text


def test_half_a_surrogate_pair_does_not_stop_the_page(page_of):
    assert page_of["profile"]("file\udcff").encode("utf-8")


def test_every_section_of_a_full_profile_says_what_is_in_it(full_profile, probes_of, nothing):
    profile = full_profile()
    profile.functions["emotion"] = nothing
    found = check_self_contained(profile_page(profile, probes_of("ocr", "count")))
    assert found.headings == SECTIONS
    pieces = (
        "ocr is read in layer 2 : when this layer alone reads the other image, 93 % of the answers become",
        "Not measurable: emotion (3 of 50 pairs answered); 20 answered pairs are needed.",
        "ocr 40/50 2 90.0 % (80-95) 90.0 % 2 2 93.0 % (of 98.0 %) no",
        "emotion (not measurable) 3/50",
        "ocr 0.0 % 0.0 % 5.0 % 50.0 % -",  # controls
        "Says of image a: said x With image b read at layer 2: swapped x (changed)",
        "ocr 0-2 3-5 3 of 6 0.5 1 80",  # drop plan
        "5 both 92 sum 95",
        "2 of 2 combinations add up",
        "ocr 1 2 0-1 2 yes 3.4",  # against the base
        "ocr 1,234 9.2 2.5 5 61.5",
        "all 4,321 11.8 - 5 99.5",
        "5 rows: x",
        "swap, on all text after the image",
        "builtin-1, sha256 0",
        "vfl-train profile --model m --functions",
    )
    assert [p for p in pieces if p not in found.text] == []
    assert found.tags.count("img") == 3 + 2 * 2, "heat map, curves, drop curves; one recorded pair a function"


def test_sections_without_data_do_not_appear(profile_of, function_of, nothing, probes_of, full_profile):
    bare = replace(function_of(6), controls={}, details={}, examples=[])
    page_text = profile_page(profile_of({"ocr": bare}), probes_of())
    assert check_self_contained(page_text).headings == ALWAYS | {"Layer by layer"}
    few = Scan(profile_page(profile_of({"ocr": nothing}), probes_of("ocr")))
    assert few.headings == ALWAYS | {"Example pairs"} and "read in" not in few.text
    full = full_profile()
    for key, heading in {
        "interaction": "Do the blocks of different functions interact?",
        "compared_with": "Did training move the layers?",
    }.items():
        without = Scan(profile_page(replace(full, **{key: {}}), probes_of("ocr")))
        assert without.headings == SECTIONS - {heading}


def test_pairs_without_recorded_outputs_are_shown_alone(profile_of, function_of, probes_of):
    profile = profile_of({"ocr": replace(function_of(6), examples=[])})
    found = Scan(profile_page(profile, probes_of("ocr"), examples=2))
    assert found.tags.count("img") == 2 + 2 * 2 and "Says of image a" not in found.text
    gone = replace(function_of(6), examples=[{"pair": 99, "said": "lost"}])
    assert "lost" not in profile_page(profile_of({"ocr": gone}), probes_of("ocr"))


@pytest.mark.parametrize(
    ("intervention", "peak", "sentence"),
    [
        ("drop", 2, "ocr depends most on layer 2: without the image there, 90 % of the answers change."),
        ("drop", None, "ocr does not depend on the image at any one layer: no drop changes an answer."),
        (
            "drop-from", 2,
            "ocr loses most at layer 2: dropping the image from there on changes 80 points more than "
            "from the next layer on.",
        ),
    ],
)  # fmt: skip
def test_findings_of_drops(profile_of, function_of, intervention, peak, sentence):
    f = replace(function_of(6), flip_rate=[], controls={}, flip_block=[], peak_layer=peak)
    ((name, *parts),) = findings(profile_of({"ocr": f}, intervention=intervention))
    assert f"{name} {''.join(parts)}" == sentence


def test_findings_of_blocks(profile_of, function_of):
    wide = function_of(6, block=(1, 2, 3))
    nowhere = replace(function_of(6), flip_block=[], details={})
    spread, lost = findings(profile_of({"ocr": wide, "count": nowhere}))
    assert "".join(spread[1:]).startswith("is spread over layers 1-3, more than a quarter of the depth: when")
    assert lost[2] == "" and lost[1].startswith("was not found")


def test_drop_plans_at_both_ends(full_profile):
    profile = full_profile()
    plan = {"points_lost": 0.0, "allowed_points": 0.5}
    rows = drop_rows(
        replace(profile, drop_plan={"ocr": plan | {"from_layer": 6}, "count": plan | {"from_layer": 0}})
    )
    assert [(r["needed"], r["free"], r["saved"]) for r in rows] == [
        ("0-5", "-", "0 of 6"), ("-", "0-5", "6 of 6")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("own", "other", "both", "verdict"),
    [
        (0.9, 0.1, 0.95, ""),
        (1.0, 0.0, 1.0, ""),
        (0.5, 0.5, 0.5, "less"),
        (0.1, 0.1, 0.9, "more"),
        (0.5, 0.1, 0.7, ""),
    ],
)
def test_whether_blocks_add_up(profile_of, function_of, own, other, both, verdict):
    rates = {"own": own, "other": other, "both": both, "pairs": 20}
    functions = {"ocr": function_of(6, block=(2,)), "count": function_of(6, block=(4,))}
    profile = profile_of(functions, interaction={"ocr": {"count": rates}, "count": {"ocr": rates}})
    rows = interaction_rows(profile)
    own_cell, cell = rows[0]["cells"]
    assert cell["verdict"] == verdict and cell["sum"] == f"{100 * min(1, own + other):.0f}"
    assert own_cell["sum"] == ""
    assert interaction_summary(rows).startswith(f"{0 if verdict else 2} of 2 combinations")


def test_blocks_with_common_layers_are_not_judged(profile_of, function_of):
    rates = {"own": 0.5, "other": 0.5, "both": 0.5, "pairs": 20}
    functions = {"ocr": function_of(6, block=(2, 3)), "count": function_of(6, block=(3, 4))}
    rows = interaction_rows(
        profile_of(functions, interaction={"ocr": {"count": rates}, "count": {"ocr": rates}})
    )
    assert rows[0]["cells"][1]["verdict"] == "overlap"
    assert interaction_summary(rows) == "2 combinations are not judged: their blocks have layers in common."


def test_the_command_repeats_the_profile(full_profile):
    profile = full_profile(name="some model; rm -rf /")
    words = shlex.split(command(profile))
    assert words[:4] == ["vfl-train", "profile", "--model", "some model; rm -rf /"]
    given = {words[i][2:].replace("-", "_"): words[i + 1] for i in range(2, len(words), 2)}
    assert given.keys() <= ProfileConfig.__dataclass_fields__.keys(), "an option that the command lacks"
    assert given["functions"] == "ocr,count" and given["seed"] == "7"
    assert given["pairs"] == "50" and "revision" not in given and "probes" not in given
    mine = {"name": "my probes", "sha256": "1"}
    own = replace(profile, probe_set=mine, settings={"own_probes": True, "drop_points": 2.5})
    assert "--probes 'my probes'" in command(own) and "--drop-points 2.5" in command(own)
    named = replace(own, probe_set={"name": "builtin-like", "sha256": "1"})
    assert "--probes builtin-like" in command(named)


def test_function_rows_of_what_is_not_measurable(profile_of, nothing):
    (row,) = function_rows(profile_of({"ocr": nothing}))
    assert row["name"] == "ocr (not measurable)"
    assert {row[k] for k in ("peak", "changed", "flipped", "joint", "layers", "block", "spread")} == {"-"}
    assert control_rows(profile_of({"ocr": nothing})) == []


def test_ranges_of_layers():
    assert format_layers([7, 2, 3, 4]) == "2-4,7"
    assert format_layers([]) == "-"


def test_long_texts_and_large_images_are_cut(profile_of, function_of, probes_of):
    (shown,) = tiles([(Image.new("RGB", (4000, 100)), "q" * 500, "a" * 500, "n")])
    assert len(shown["question"]) <= 121 and len(shown["answer"]) <= 121 and len(shown["image"]) < 5000
    text = profile_page(profile_of({"ocr": function_of(6)}), probes_of("ocr", text="q" * 5000))
    assert "q" * 300 + "…" in text and "q" * 301 not in text
