"""Keyed permutations: bijective for every size, uniform, and the same whichever part of them is read."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from dataflex.utils.permutation import SORTED_SIZE, KeyedPermutation, RepeatedPermutation

AROUND_POWERS_OF_TWO = sorted({2**power + offset for power in range(1, 18) for offset in (-1, 0, 1)})


@pytest.mark.parametrize("key", [("a",), (1, "b")])
def test_bijective_for_every_size(key):
    for size in [*range(1, 130), *AROUND_POWERS_OF_TWO, 10_007, 99_999, 317**2, 317**2 + 1]:
        elements = KeyedPermutation(size, *key).at(np.arange(size))
        assert elements.dtype == np.int64
        assert np.array_equal(np.sort(elements), np.arange(size)), size


@given(st.integers(1, 10**9), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_distinct_positions_of_any_size_give_distinct_elements(size, key):
    positions = np.unique(np.linspace(0, size - 1, 500).astype(np.int64))
    elements = KeyedPermutation(size, key).at(positions)
    assert len(np.unique(elements)) == len(positions)
    assert elements.min() >= 0 and elements.max() < size


def test_a_part_is_read_without_the_rest_and_without_changing_the_positions():
    permutation, positions = KeyedPermutation(5000, 7), np.array([4999, 0, 17, 17])
    assert permutation.at(positions).tolist() == permutation.at(np.arange(5000))[positions].tolist()
    assert positions.tolist() == [4999, 0, 17, 17]


def test_memory_grows_with_the_square_root_of_the_size():
    tracemalloc.start()
    KeyedPermutation(10**9, 0).at(np.arange(10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6  # a permutation of so many would take 8e9 bytes


def test_keys_give_different_permutations():
    orders = {tuple(KeyedPermutation(2000, *key).at(np.arange(20))) for key in [(0,), (1,), ("0",), (0, 0), (0, 1)]}
    assert len(orders) == 5
    assert np.array_equal(KeyedPermutation(2000, 3).at(np.arange(9)), KeyedPermutation(2000, 3).at(np.arange(9)))


def test_every_position_is_equally_likely_to_hold_every_element():
    size, keys, bins = 1600, 1500, 20
    positions = np.arange(0, size, 41)
    drawn = np.stack([KeyedPermutation(size, "position", key).at(positions) for key in range(keys)])
    p_values = [chisquare(np.bincount(column * bins // size, minlength=bins)).pvalue for column in drawn.T]
    assert min(p_values) > 1e-3 / len(p_values) and 0.3 < np.mean(p_values) < 0.7


def test_neighbours_are_unrelated():
    size = 1600
    differences = np.concatenate([np.diff(KeyedPermutation(size, "neighbours", key).at(np.arange(size))) % size for key in range(100)])
    assert np.bincount(differences, minlength=size)[0] == 0  # a permutation
    groups = np.bincount((differences - 1) * 13 // (size - 1), minlength=13)  # 1599 possible differences, 123 in a group
    assert chisquare(groups).pvalue > 1e-3


def test_all_orders_of_a_small_domain_are_equally_likely():
    passes = RepeatedPermutation(4, "orders").span(0, 4 * 2400).reshape(-1, 4)
    _, counts = np.unique(passes, axis=0, return_counts=True)
    assert len(counts) == 24 and chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 1000, SORTED_SIZE, SORTED_SIZE + 1, 3000])
def test_every_pass_holds_every_element_once(size):
    passes = RepeatedPermutation(size, "passes").span(0, 3 * size).reshape(3, size)
    assert np.array_equal(np.sort(passes, axis=1), np.tile(np.arange(size), (3, 1)))
    assert size < 1000 or not np.array_equal(passes[0], passes[1])


@given(st.sampled_from([1, 2, 7, 60, SORTED_SIZE, SORTED_SIZE + 1]), st.lists(st.integers(0, 2500), min_size=1, max_size=5), st.integers(0, 5000))
@settings(deadline=None)
def test_spans_join(size, counts, start):
    whole = RepeatedPermutation(size, 1).span(start, sum(counts))
    order, parts = RepeatedPermutation(size, 1), []
    for count in counts:
        parts.append(order.span(start + sum(map(len, parts)), count))
    assert np.array_equal(np.concatenate(parts), whole) and len(whole) == sum(counts)
