"""Every family's engine against its reference path, to the rounding of the reference itself.

The truth is a float64 copy on the reference path. The engine may be at most four times as far from it as the
float32 reference is: both round the same sums in different orders. (The older families on many more rows:
tests/interventions/test_families_engine.py.)
"""

from __future__ import annotations

import pytest
from family_cases import VARIANT_REASONS, logprobs, one_image, rows_of, truth_of, two_images
from tiny_models import SUPPORTED, tiny_vlm

from vfl_train.interventions.readout import Cost


@pytest.fixture(params=SUPPORTED)
def name(request):
    return request.param


def test_the_engine_is_as_exact_as_the_reference(name):
    vlm = tiny_vlm(name)
    rows = rows_of(vlm)
    truth = truth_of(vlm, rows)
    reference, engine = (logprobs(vlm, rows, path) for path in ("reference", "engine"))
    allowed = 4 * (reference - truth).abs().max() + 2**-23 * truth.abs().max()
    assert (engine - truth).abs().max() <= allowed
    first = len(rows[0].answer)
    felt = max((truth[k : k + first] - truth[:first]).abs().max() for k in range(first, 6 * first, first))
    assert felt > 1000 * allowed, "no branch is felt: it shows nothing"


def test_every_row_of_one_image_runs_on_the_path_that_the_family_names(name):
    vlm, cost = tiny_vlm(name), Cost()
    rows = one_image(vlm)
    logprobs(vlm, rows, "engine", cost)
    reason = VARIANT_REASONS.get(name, vlm.family.reference_only)
    assert (cost.rows, cost.reference_rows) == (len(rows), 0 if reason is None else len(rows))
    assert all(reason in found for found in cost.reasons)


def test_of_two_images_only_text_between_them_leaves_the_engine(name):
    vlm, cost = tiny_vlm(name), Cost()
    if not vlm.family.several_images:
        pytest.skip(f"prompts of {vlm.model_type} hold one image")
    if name in VARIANT_REASONS or vlm.family.reference_only is not None:
        pytest.skip(f"{name} runs on the reference path")
    rows = two_images(vlm)
    logprobs(vlm, rows, "engine", cost)
    between = [any(i.phase == "text" and i.spans in (None, {0}) for i in row.branch) for row in rows]
    assert cost.reference_rows == sum(between) > 0
    assert all("between images" in reason for reason in cost.reasons)
