"""Where a processor puts images and videos: placeholder tokens in the text, and what they are expanded to."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image as PilImage


@dataclass(frozen=True)
class Place:
    """Where an image or a video went: the tokens [start, stop) that the processor put for it, text around its
    placeholders included, its `size` in pixels (width, height), and the `frames` of a video (0: an image)."""

    start: int
    stop: int
    size: tuple[int, int]
    frames: int = 0


def replacements_of(outputs: Mapping[str, Any]) -> list[dict]:
    """What the processor put in place of each placeholder, in characters. Where there is none, some
    processors make a tensor of the empty list."""
    found = outputs.get("text_replacement_offsets")
    return [] if found is None or len(found) == 0 else list(found[0])


def expansion(replacements: list[dict]) -> Callable[[int], int]:
    """Maps a character of the rendered text to the text in which placeholders are expanded."""
    ends = [item["span"][1] for item in replacements]
    gained = [0, *(item["new_span"][1] - item["span"][1] for item in replacements)]
    return lambda character: character + gained[bisect.bisect_right(ends, character)]


def places_of(
    outputs: Mapping[str, Any], images: Sequence[PilImage], videos: Sequence[Sequence[PilImage]] = ()
) -> tuple[Place, ...]:
    """The tokens that each image and video was expanded to, in the order of the prompt, from the characters
    the processor reports."""
    replacements = [item for item in replacements_of(outputs) if item["type"] in ("image", "video")]
    if sorted(item["type"] for item in replacements) != ["image"] * len(images) + ["video"] * len(videos):
        return ()
    shapes = {
        "image": iter([(image.size, 0) for image in images]),
        "video": iter([(frames[0].size, len(frames)) for frames in videos]),
    }
    offsets = outputs["offset_mapping"][0].tolist()
    places = []
    for item in replacements:
        first, last = item["new_span"]
        tokens = [i for i, (start, end) in enumerate(offsets) if end > first and start < last]
        if not tokens:
            return ()
        places.append(Place(tokens[0], tokens[-1] + 1, *next(shapes[item["type"]])))
    return tuple(places)


def placeholders_of(processor: Any) -> tuple[list[int], list[str]]:
    """The tokens that stand for images, videos or sound in this processor's texts: ids and strings."""
    tokenizer = processor.tokenizer
    names = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")]
    ids = list(getattr(processor, "image_token_ids", None) or [])
    ids += [tokenizer.convert_tokens_to_ids(name) for name in names if name]
    ids = [i for i in dict.fromkeys(ids) if i is not None and i != tokenizer.unk_token_id]
    return ids, list(dict.fromkeys([*filter(None, names), *tokenizer.convert_ids_to_tokens(ids)]))


def put_before(processor: Any, text: str) -> int:
    """Characters that the processor itself puts before `text` (Emu3: the begin-of-text token). They count in
    the positions that it reports."""
    layout = getattr(processor, "prepare_inputs_layout", None)
    return 0 if layout is None else max(0, layout(text=[text])[1][0].find(text))
