"""HTML pages, self-contained: pictures are data URIs and every text from outside is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
from PIL import Image

from vfl_train import __version__
from vfl_train.options import format_layers
from vfl_train.report.heatmap import heatmap_bytes
from vfl_train.schemas import FunctionProfile, Profile

if TYPE_CHECKING:
    from vfl_train.functions.probes import ProbeSet

THUMBNAIL = 152  # pixels


@lru_cache(maxsize=1)
def _templates() -> jinja2.Environment:
    loader = jinja2.PackageLoader("vfl_train.report", "templates")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)


def page(template: str, title: str, lead: str, **values: Any) -> str:
    """Render one of the templates. Everything in `values` is escaped."""
    return _templates().get_template(template).render(title=title, lead=lead, version=__version__, **values)


def data_uri(png: bytes) -> str:
    """PNG bytes as a URI that a page can hold."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def thumbnail(image: Image.Image) -> str:
    """A small PNG of `image` as a data URI."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return data_uri(buffer.getvalue())


def percent(share: float) -> str:
    """0.873 -> "87.3 %"."""
    return f"{100 * share:.1f} %"


def function_rows(profile: Profile) -> list[dict[str, str]]:
    """The table of a profile, one row a function."""
    return [_function_row(name, f) for name, f in profile.functions.items()]


def _function_row(name: str, f: FunctionProfile) -> dict[str, str]:
    row = dict.fromkeys(("peak", "changed", "flipped", "self", "nuisance", "unrelated", "noise"), "-")
    row |= {"name": name, "answered": f"{f.pairs_answered}/{f.pairs}"}
    row |= {"layers": format_layers(f.layers), "block": format_layers(f.flip_block)}
    row |= {kind: percent(max(rates)) for kind, rates in f.controls.items() if rates}
    if f.peak_layer is not None:
        low, high = f.ci95[f.peak_layer]
        row["peak"] = str(f.peak_layer)
        row["changed"] = f"{percent(f.change_rate[f.peak_layer])} ({100 * low:.0f}-{100 * high:.0f})"
        row["flipped"] = percent(f.flip_rate[f.peak_layer]) if f.flip_rate else "-"
    if f.status != "ok":
        row["name"] += f" ({f.status.replace('_', ' ')})"
    return row


def profile_page(profile: Profile, probes: ProbeSet, examples: int = 3) -> str:
    """The report of a profile with `examples` pairs a function."""
    shown = {
        name: [
            {"a": thumbnail(p.image_a), "b": thumbnail(p.image_b), "question": p.pair.question,
             "answer_a": p.pair.answer_a, "answer_b": p.pair.answer_b}
            for p in pairs[:examples]
        ]
        for name, pairs in probes.pairs.items()
    }  # fmt: skip
    model = profile.model
    lead = (
        f"{model.model_type}, {model.num_layers} layers, {profile.intervention} of the image at each layer "
        f"({profile.path} path, {profile.dtype}), probe set {profile.probe_set['name']}."
    )
    return page(
        "profile.html", f"Vision function layers of {model.name_or_path}", lead,
        heatmap=data_uri(heatmap_bytes(profile)), functions=function_rows(profile), examples=shown,
        intervention=profile.intervention,
    )  # fmt: skip


def tiles(rows: Sequence[tuple[Image.Image | None, str, str, str]]) -> list[dict[str, str]]:
    """(image, question, answer, note) as what `tiles.html` shows."""
    return [
        {
            "image": "" if image is None else thumbnail(image),
            "question": q[:120],
            "answer": a[:120],
            "note": n,
        }
        for image, q, a, n in rows
    ]
