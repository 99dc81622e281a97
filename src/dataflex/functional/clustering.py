"""Clusters of like rows, by scikit-learn, and draws from each. Legend: N rows, D dimensions."""

from __future__ import annotations

import numpy as np

from dataflex.errors import ComponentError
from dataflex.utils.seeding import derive_seed

MINI_BATCH_FROM = 20_000
"""Rows from which centres are fitted to random batches instead of all rows."""


def cluster(features: np.ndarray, num_clusters: int, seed_key: tuple[object, ...]) -> np.ndarray:
    """Cluster (N,) int64 of each row by k-means, numbered from 0 without gaps; the same for the same key.

    Args:
        features: finite vectors (N, D), of unit length for clusters by direction.
        num_clusters: wanted; there are fewer if there are fewer different rows.

    Raises:
        ComponentError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans, MiniBatchKMeans
    except ImportError:
        raise ComponentError("clustering needs scikit-learn: pip install scikit-learn") from None
    num_clusters = min(num_clusters, len(features))
    if num_clusters <= 1:
        return np.zeros(len(features), dtype=np.int64)
    seed = derive_seed(*seed_key) % 2**32
    if len(features) < MINI_BATCH_FROM:
        model = KMeans(num_clusters, n_init=1, max_iter=20, random_state=seed)
    else:
        model = MiniBatchKMeans(num_clusters, n_init=1, max_iter=20, batch_size=4096, random_state=seed)
    return np.unique(model.fit_predict(features), return_inverse=True)[1].astype(np.int64)


def draw_representatives(labels: np.ndarray, per_cluster: int, key: tuple[object, ...]) -> list[np.ndarray]:
    """At most `per_cluster` random rows of each cluster, ascending; item c belongs to cluster c of `labels` (N,), which are 0 or more."""
    shuffled = np.random.default_rng(derive_seed(*key)).permutation(len(labels))
    by_cluster = shuffled[np.argsort(labels[shuffled], kind="stable")]
    ends = np.cumsum(np.bincount(labels))
    return [np.sort(rows[:per_cluster]) for rows in np.split(by_cluster, ends[:-1])]
