"""Nearest neighbours against brute force; features with few exact values make ties everywhere."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.functional import neighbours
from dataflex.functional.neighbours import nearest, nearest_with_faiss


def signs(number, dimensions, seed):
    """Unit vectors of +-1/sqrt(D), D a power of 4: products are exact in any order of summation, and few are different."""
    return np.random.default_rng(seed).choice([-1.0, 1.0], (number, dimensions)).astype(np.float32) / math.isqrt(dimensions)


def unit(number, dimensions, seed):
    features = np.random.default_rng(seed).standard_normal((number, dimensions)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def brute_force(queries, rows, k):
    similarities = queries @ rows.T
    ids = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(similarities, ids, 1)


@given(st.integers(1, 6), st.integers(1, 60), st.integers(0, 70), st.integers(1, 25), st.integers(1, 4), st.integers(0, 999))
def test_ties_go_to_the_smaller_row_for_every_block_size(num_queries, num_rows, k, block_rows, query_block, seed):
    queries, rows = signs(num_queries, 16, seed), signs(num_rows, 16, seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "QUERY_BLOCK", query_block)
        ids, similarities = nearest(queries, rows, k, block_rows=block_rows)
    expected_ids, expected = brute_force(queries, rows, k)
    assert ids.dtype == np.int64 and similarities.dtype == np.float32
    assert ids.tolist() == expected_ids.tolist() and similarities.tolist() == expected.tolist()


def test_all_rows_equal():
    ids, similarities = nearest(np.ones((2, 1), np.float32), np.ones((900, 1), np.float32), 700, block_rows=64)
    assert ids.tolist() == [list(range(700))] * 2 and (similarities == 1).all()


def test_known_angles():
    degrees = np.deg2rad([0, 80, 25, 350, 190])
    rows = np.stack([np.cos(degrees), np.sin(degrees)], 1)
    ids, similarities = nearest(np.array([[1.0, 0.0], [0.0, 1.0]]), rows, 3)
    assert ids.tolist() == [[0, 3, 2], [1, 2, 0]]
    assert similarities[0] == pytest.approx(np.cos(np.deg2rad([0, 10, 25])), abs=1e-6)


def test_general_vectors_agree_with_brute_force():
    queries, rows = unit(5, 24, 0), unit(700, 24, 1)
    ids, similarities = nearest(queries, rows, 40, block_rows=128)
    assert ids.tolist() == brute_force(queries, rows, 40)[0].tolist()
    assert similarities == pytest.approx(brute_force(queries, rows, 40)[1], abs=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.filterwarnings("error")
def test_rows_may_be_mapped_from_a_file_of_any_float_type(tmp_path, dtype):
    queries, rows = signs(3, 16, 0), signs(50, 16, 1)
    np.save(tmp_path / "rows.npy", rows.astype(dtype))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert nearest(queries, mapped, 9, block_rows=7)[0].tolist() == brute_force(queries, rows, 9)[0].tolist()


def test_rows_without_a_similarity_come_last_as_minus_one():
    rows = signs(6, 4, 0)
    rows[[1, 4]] = math.nan
    ids, similarities = nearest(signs(2, 4, 1), rows, 6, block_rows=4)
    assert (ids[:, 4:] == -1).all() and (similarities[:, 4:] == -math.inf).all()
    assert sorted(ids[0, :4].tolist()) == [0, 2, 3, 5] and np.isfinite(similarities[:, :4]).all()


def test_nothing_to_search():
    assert nearest(np.empty((0, 4)), signs(5, 4, 0), 3)[0].shape == (0, 3)
    assert nearest(signs(2, 4, 0), np.empty((0, 4)), 3)[0].shape == (2, 0)


def test_faiss_is_used_beyond_the_limit_only(monkeypatch):
    pytest.importorskip("faiss")
    calls = []
    monkeypatch.setattr(neighbours, "nearest_with_faiss", lambda *args, **kwargs: calls.append((args, kwargs)) or (None, None))
    queries, rows = signs(2, 4, 0), signs(8, 4, 1)
    monkeypatch.setattr(neighbours, "EXACT_LIMIT", 2 * 2 * 8 * 4)
    nearest(queries, rows, 3)
    assert not calls
    monkeypatch.setattr(neighbours, "EXACT_LIMIT", 2 * 2 * 8 * 4 - 1)
    nearest(queries, rows, 3, block_rows=5)
    assert calls == [((queries, rows, 3), {"block_rows": 5})]


def test_without_faiss_the_search_is_exact(monkeypatch):
    monkeypatch.setattr(neighbours, "EXACT_LIMIT", 0)
    monkeypatch.setattr(neighbours.importlib.util, "find_spec", lambda name: None)
    queries, rows = signs(2, 16, 0), signs(30, 16, 1)
    assert nearest(queries, rows, 5)[0].tolist() == brute_force(queries, rows, 5)[0].tolist()


def test_faiss_finds_most_of_the_neighbours_in_the_same_order():
    pytest.importorskip("faiss")
    centres = unit(20, 16, 0)
    rows = np.repeat(centres, 200, 0) + 0.2 * unit(4000, 16, 1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    queries = rows[::400]
    ids, similarities = nearest_with_faiss(queries, rows, 50, block_rows=999)
    exact_ids = nearest(queries, rows, 50)[0]
    recall = np.mean([len(np.intersect1d(a, b)) / 50 for a, b in zip(ids, exact_ids, strict=True)])
    assert recall > 0.95 and ids.dtype == np.int64 and similarities.dtype == np.float32
    assert (np.diff(similarities, axis=1) <= 0).all()
    assert similarities == pytest.approx(np.take_along_axis(queries @ rows.T, ids, 1), abs=1e-5)


def test_faiss_with_few_rows_finds_what_exact_search_finds():
    pytest.importorskip("faiss")
    queries, rows = unit(3, 16, 0), unit(120, 16, 1)
    for k in (0, 1, 7, 200):
        ids, similarities = nearest_with_faiss(queries, rows, k)
        expected_ids, expected = nearest(queries, rows, k)
        assert ids.tolist() == expected_ids.tolist() and similarities == pytest.approx(expected, abs=1e-6)


def test_ids_that_faiss_does_not_find_are_marked_at_the_end(monkeypatch):
    faiss = pytest.importorskip("faiss")
    found = np.array([[0.5, -3.4e38, 0.9, 0.5]], np.float32), np.array([[6, -1, 3, 2]])
    monkeypatch.setattr(faiss.IndexIVFFlat, "search", lambda *args: found)
    ids, similarities = nearest_with_faiss(signs(1, 4, 0), signs(40, 4, 1), 4)
    assert ids.tolist() == [[3, 2, 6, -1]] and similarities.tolist() == [[np.float32(0.9), 0.5, 0.5, -math.inf]]
