"""Handwritten digits nobody here made: the UCI "Optical Recognition of Handwritten Digits" test set
(E. Alpaydin, C. Kaynak, 1998, CC BY 4.0) as scikit-learn ships it, 1797 images of 8 x 8.

They are the phantom's *shifted domain*: it has never seen handwriting. Half of the specimens of each
digit are for training on the shift (`train`), the other half only for measuring it (`test`).
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files

import numpy as np


@lru_cache(maxsize=2)
def handwritten_digits(split: str) -> tuple[np.ndarray, ...]:
    """Per digit 0..9 its specimens of `split` (`train` or `test`), uint8 [n, 8, 8], ink = 255.

    Raises ValueError for another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    with files("vfl_train.phantom").joinpath("digits.npz").open("rb") as f, np.load(f) as data:
        images, labels = data["images"], data["labels"]
    start = 0 if split == "train" else 1
    scaled = np.minimum(images.astype(np.uint16) * 16, 255).astype(np.uint8)
    return tuple(scaled[labels == d][start::2] for d in range(10))
