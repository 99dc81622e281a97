"""Clusters and draws from them."""

import builtins
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.errors import ComponentError
from dataflex.functional import clustering
from dataflex.functional.clustering import cluster, draw_representatives


def groups(sizes, seed=0):
    """Unit vectors near one axis per group, shuffled, and the group of each."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    features = np.eye(len(sizes) + 3)[owner] + 0.02 * rng.standard_normal((len(owner), len(sizes) + 3))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32), owner


@pytest.mark.parametrize("mini_batch_from", [10**9, 0])
def test_separated_groups_are_found_and_repeat_with_the_key(monkeypatch, mini_batch_from):
    monkeypatch.setattr(clustering, "MINI_BATCH_FROM", mini_batch_from)
    features, owner = groups([300, 200, 400])
    labels = cluster(features, 3, (0, "clusters"))
    assert labels.dtype == np.int64 and len(set(zip(labels.tolist(), owner.tolist(), strict=True))) == 3
    np.random.seed(1)
    assert labels.tolist() == cluster(features, 3, (0, "clusters")).tolist()


def test_another_key_starts_elsewhere():
    features = np.random.default_rng(0).standard_normal((200, 5))
    assert cluster(features, 20, (0,)).tolist() != cluster(features, 20, (1,)).tolist()


def test_as_many_clusters_as_rows_or_more():
    features, _ = groups([1] * 9)
    for wanted in (9, 50):
        assert sorted(cluster(features, wanted, (0,)).tolist()) == list(range(9))


@pytest.mark.parametrize("mini_batch_from", [10**9, 0])
def test_fewer_different_rows_than_clusters_leave_no_gap(monkeypatch, mini_batch_from):
    monkeypatch.setattr(clustering, "MINI_BATCH_FROM", mini_batch_from)
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 8, 60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn says that there are fewer
        labels = cluster(rng.standard_normal((8, 3))[kinds], 20, (0,))
    assert sorted(set(labels.tolist())) == list(range(labels.max() + 1))
    assert len(set(zip(labels.tolist(), kinds.tolist(), strict=True))) == 8


def test_one_cluster_and_none():
    assert cluster(np.eye(3), 1, (0,)).tolist() == [0, 0, 0]
    assert cluster(np.empty((0, 3)), 4, (0,)).tolist() == []


def test_missing_scikit_learn_is_named(monkeypatch):
    real = builtins.__import__

    def without_sklearn(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ComponentError, match="pip install scikit-learn"):
        cluster(np.eye(3), 2, (0,))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40).map(np.array), st.integers(1, 5), st.integers(0, 99))
def test_representatives_are_different_rows_of_their_cluster(labels, per_cluster, seed):
    drawn = draw_representatives(labels, per_cluster, (seed, "representatives"))
    assert len(drawn) == labels.max() + 1
    for number, rows in enumerate(drawn):
        assert len(rows) == min(per_cluster, int((labels == number).sum()))
        assert (labels[rows] == number).all() and (np.diff(rows) > 0).all()


def test_representatives_depend_on_the_key_and_every_row_is_as_likely():
    labels = np.array([0, 1] * 5)
    first = [rows.tolist() for rows in draw_representatives(labels, 2, (0, "a"))]
    assert first == [rows.tolist() for rows in draw_representatives(labels, 2, (0, "a"))]
    counts = np.zeros(10)
    for counter in range(2000):
        counts[np.concatenate(draw_representatives(labels, 2, (0, counter)))] += 1
    assert (np.abs(counts / 2000 - 0.4) < 4 * np.sqrt(0.4 * 0.6 / 2000)).all()
