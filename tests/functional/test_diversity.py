"""The diversity filter against a plain loop and the chain that the reference gets wrong (ALGORITHMS B13)."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.functional.diversity import diverse


def one_by_one(order, features, n, threshold):
    accepted: list[int] = []
    for row in order:
        if len(accepted) < n and all(features[row] @ features[other] <= threshold for other in accepted):
            accepted.append(int(row))
    return accepted


@pytest.mark.parametrize("block", [1, 2, 3])
def test_a_row_is_not_compared_with_rows_left_out(block):
    # cos(a, b) = cos(b, c) = .95 and cos(a, c) = .85.
    gram = np.array([[1.0, 0.95, 0.85], [0.95, 1.0, 0.95], [0.85, 0.95, 1.0]])
    features = np.linalg.cholesky(gram)
    assert diverse(np.arange(3), features, 3, block=block).tolist() == [0, 2]
    assert diverse(np.array([1, 0, 2]), features, 3, block=block).tolist() == [1]


# Entries +-1/4: products are multiples of 1/8 and exact, so thresholds are met exactly.
@given(st.integers(0, 40), st.integers(0, 20), st.sampled_from([-0.25, 0.0, 0.125, 0.25, 0.5, 1.0]), st.integers(1, 9), st.integers(0, 9999))
def test_equals_the_sequential_loop_for_every_block_size(num_rows, n, threshold, block, seed):
    rng = np.random.default_rng(seed)
    features = rng.choice([-0.25, 0.25], (num_rows, 16)).astype(np.float32)
    order = rng.permutation(num_rows)[: num_rows - num_rows // 4]
    assert diverse(order, features, n, threshold, block=block).tolist() == one_by_one(order, features, n, threshold)


def test_more_accepted_rows_than_one_product_holds():
    rng = np.random.default_rng(0)
    features = rng.choice([-0.25, 0.25], (300, 16))
    order = rng.permutation(300)
    expected = one_by_one(order, features, 300, 0.75)
    assert len(expected) > 8 * 4 and diverse(order, features, 300, 0.75, block=4).tolist() == expected


def test_rows_without_an_embedding_are_left_out():
    features = np.array([[math.nan, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [math.nan, math.nan]])
    assert diverse(np.array([4, 1, 0, 3, 2]), features, 5).tolist() == [1, 2]


def test_duplicates_pass_only_at_threshold_one():
    features = np.eye(2)[[0, 0, 1]]
    assert diverse(np.arange(3), features, 3, threshold=1.0).tolist() == [0, 1, 2]
    assert diverse(np.arange(3), features, 3, threshold=0.999).tolist() == [0, 2]
