"""Similarity and average linkage against scikit-learn's and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import AgglomerativeClustering

from vfl_train.knockout.cluster import average_linkage, leaf_order, pearson


def test_pearson_equals_numpys():
    vectors = np.random.default_rng(0).normal(size=(5, 12))
    np.testing.assert_allclose(pearson(vectors), np.corrcoef(vectors), atol=1e-12)


def test_a_constant_vector_is_like_nothing():
    found = pearson([[0, 0, 0], [1, 2, 3], [3, 2, 1]])
    assert found[0] == [None, None, None] and found[1][1:] == pytest.approx([1, -1])
    assert average_linkage(found) == [(0, 1, 1.0), (2, 3, pytest.approx(1.5))]


@pytest.mark.parametrize("seed", range(5))
def test_linkage_equals_scikit_learns(seed):
    vectors = np.random.default_rng(seed).normal(size=(9, 12))
    similarity = pearson(vectors)
    merges = average_linkage(similarity)
    theirs = AgglomerativeClustering(
        metric="precomputed", linkage="average", compute_distances=True, n_clusters=1
    ).fit(1 - np.array(similarity))
    np.testing.assert_allclose([m[2] for m in merges], theirs.distances_, atol=1e-12)
    assert [{a, b} for a, b, _ in merges] == [set(pair) for pair in theirs.children_.tolist()]


def test_leaves_are_ordered_so_that_no_branches_cross():
    assert leaf_order([(0, 2, 0.1), (1, 3, 0.2), (4, 5, 0.9)], 4) == [0, 2, 1, 3]
    assert leaf_order([(1, 0, 0.5)], 2) == [1, 0]
