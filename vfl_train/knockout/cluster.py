"""Which tasks are alike in what layers do to them: Pearson similarity and average linkage, as TaLo clusters
its tasks. Plain numbers; the linkage is UPGMA on 1 - r (Sokal and Michener, 1958)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pearson(vectors: Sequence[Sequence[float]]) -> list[list[float | None]]:
    """Correlation of every two vectors; None where one of them is constant."""
    centered = np.asarray(vectors, dtype=float)
    centered = centered - centered.mean(1, keepdims=True)
    norms = np.linalg.norm(centered, axis=1)
    return [
        [
            float(np.clip(a @ b / (na * nb), -1, 1)) if na > 1e-12 and nb > 1e-12 else None
            for b, nb in zip(centered, norms, strict=True)
        ]
        for a, na in zip(centered, norms, strict=True)
    ]


def average_linkage(similarity: Sequence[Sequence[float | None]]) -> list[tuple[int, int, float]]:
    """The n - 1 merges (cluster, cluster, distance 1 - r) of n tasks, nearest first; merge i makes cluster
    n + i. What has no similarity is as far as unrelated (r = 0)."""
    n = len(similarity)
    distance = {(i, j): 1 - (similarity[i][j] or 0.0) for i in range(n) for j in range(i + 1, n)}
    sizes, merges = dict.fromkeys(range(n), 1), []
    for new in range(n, 2 * n - 1):
        (a, b), height = min(distance.items(), key=lambda item: (item[1], item[0]))
        merges.append((a, b, height))
        for other in sizes:
            if other not in (a, b):
                to_a, to_b = (distance[min(c, other), max(c, other)] for c in (a, b))
                distance[other, new] = (sizes[a] * to_a + sizes[b] * to_b) / (sizes[a] + sizes[b])
        sizes[new] = sizes.pop(a) + sizes.pop(b)
        distance = {pair: d for pair, d in distance.items() if a not in pair and b not in pair}
    return merges


def leaf_order(merges: Sequence[tuple[int, int, float]], n: int) -> list[int]:
    """Tasks from left to right such that no branches of the tree cross."""
    members: dict[int, list[int]] = {i: [i] for i in range(n)}
    for i, (a, b, _) in enumerate(merges):
        members[n + i] = members[a] + members[b]
    return members[max(members)]
