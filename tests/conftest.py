"""What all tests share: a base model folder; tests marked gpu are skipped where there is no CUDA device."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Without a GPU our triton kernels run in triton's interpreter. Triton decides at its import, which
# transformers brings about, so this stands before any test module.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def subnormal_numbers() -> Iterator[None]:
    """Training lets the processor flush them to zero, for all that comes after it in this process."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained phantom as a plain transformers folder."""
    from vfl_train.phantom.architecture import build_model, build_processor

    folder = tmp_path_factory.mktemp("base")
    processor = build_processor()
    build_model(processor, seed=0).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # seconds; only when a test asks for it

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
