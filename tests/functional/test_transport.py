"""TSDS against the exact linear programme, the heap of the authors' code and hand-computed cases (ALGORITHMS B7)."""

import heapq
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from dataflex.functional.transport import kernel_density, task_probabilities, tsds_probabilities


def unit(number, dimensions, seed):
    features = np.random.default_rng(seed).standard_normal((number, dimensions)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def instance(num_queries, num_rows, seed, depth=None):
    """Neighbour ids, ascending distances and densities of a random problem."""
    rng = np.random.default_rng(seed)
    distances = rng.uniform(0, 2, (num_queries, num_rows))
    density = rng.uniform(1, 4, num_rows)
    ids = np.argsort(distances, axis=1)[:, :depth]
    return ids, np.take_along_axis(distances, ids, 1), density


def heap_reference(ids, distances, inverse_density, alpha, C):
    """Probabilities and s as the authors' code finds them."""
    num_queries, depth = ids.shape
    inverse = inverse_density[ids]
    heap = [(inverse[i, 0], 0, i) for i in range(num_queries)]
    heapq.heapify(heap)
    accumulated, cost, last, s = distances[:, 0] * inverse[:, 0], np.zeros(num_queries), np.full(num_queries, -1), 0.0
    while heap:
        s, k, i = heapq.heappop(heap)
        cost[i] = distances[i, k + 1] * s - accumulated[i]
        if alpha / C * cost.sum() >= (1 - alpha) * num_queries:
            break
        last[i] = k
        if k < depth - 2:
            accumulated[i] += distances[i, k + 1] * inverse[i, k + 1]
            heapq.heappush(heap, (s + inverse[i, k + 1], k + 1, i))
    probabilities = np.zeros(len(inverse_density))
    for i in range(num_queries):
        mass = inverse[i, : last[i] + 1] / (num_queries * s)
        probabilities[ids[i, : last[i] + 1]] += mass
        probabilities[ids[i, last[i] + 1]] += 1 / num_queries - mass.sum()
    return probabilities, s


def objective(gamma, distances, density, alpha, C):
    num_queries, total = len(gamma), (1 / density).sum()
    imbalance = (density * np.abs(gamma - 1 / (num_queries * density * total))).max()
    return alpha / C * (gamma * distances).sum() + (1 - alpha) * num_queries * imbalance


def linear_programme(distances, density, alpha, C):
    """Smallest value of the objective: variables gamma (Q N) and the bound t of the imbalance."""
    num_queries, num_rows = distances.shape
    cells, target = num_queries * num_rows, np.tile(1 / (num_queries * density * (1 / density).sum()), num_queries)
    weight = np.tile(density, num_queries)
    bound = np.vstack([np.hstack([sign * np.diag(weight), -np.ones((cells, 1))]) for sign in (1, -1)])
    marginal = np.hstack([np.kron(np.eye(num_queries), np.ones(num_rows)), np.zeros((num_queries, 1))])
    costs = np.append(alpha / C * distances.ravel(), (1 - alpha) * num_queries)
    solution = linprog(
        costs, bound, np.concatenate([weight * target, -weight * target]), marginal, np.full(num_queries, 1 / num_queries), (0, None), "highs"
    )
    assert solution.status == 0
    return solution.fun, solution.x[:-1].reshape(num_queries, num_rows)


def test_solutions_by_hand():
    ids, distances = np.arange(6)[None], np.arange(6.0)[None]
    spread = tsds_probabilities(ids, distances, np.ones(6), 0.3, 1.0)
    assert spread.probabilities.tolist() == [0.5, 0.5, 0, 0, 0, 0] and spread.s == 2 and spread.exact
    for alpha in (0.5, 0.7, 0.9, 1.0):
        nearest_only = tsds_probabilities(ids, distances, np.ones(6), alpha, 1.0)
        assert nearest_only.probabilities.tolist() == [1, 0, 0, 0, 0, 0] and nearest_only.s == 1 and nearest_only.exact


def test_the_last_row_is_filled_in_part():
    # Densities 1 and 2: query 0 fills row 0 up to 1 / s; s = 1.5 from query 1, whose rows 2 and 0 hold 1/2 + 1.
    ids, distances = np.array([[0, 1, 2], [2, 0, 1]]), np.array([[0.0, 1.0, 9.0], [0.0, 0.5, 9.0]])
    found = tsds_probabilities(ids, distances, np.array([1.0, 1.0, 0.5]), 0.5, 4.0)
    assert found.s == 1.5
    assert found.probabilities == pytest.approx(np.array([1 / 1.5 + 1 / 1.5, 0.5 / 1.5, 0.5 / 1.5]) / 2)


def test_optimal_wherever_it_says_exact():
    seen = {True: 0, False: 0}
    for seed in range(60):
        ids, distances, density = instance(3, 12, seed)
        alpha, C = 0.2 + 0.6 * (seed % 7) / 6, 1.0 + seed % 3
        found = tsds_probabilities(ids, distances, 1 / density, alpha, C)
        by_row = np.take_along_axis(distances, np.argsort(ids, axis=1), 1)
        best, gamma = linear_programme(by_row, density, alpha, C)
        own = np.zeros((3, 12))
        for query in range(3):  # the queries' own plans, from the cap 1 / (Q s rho)
            left = 1 / 3
            for row in ids[query]:
                own[query, row] = min(left, 1 / (3 * found.s * density[row]))
                left -= own[query, row]
        assert found.probabilities.sum() == pytest.approx(1)
        value = objective(own, by_row, density, alpha, C)
        assert found.exact == (found.s <= (1 / density).sum() / 2)
        seen[found.exact] += 1
        if found.exact:
            assert value == pytest.approx(best, abs=1e-8)
            assert found.probabilities == pytest.approx(own.sum(0), abs=1e-9)
            assert objective(gamma, by_row, density, alpha, C) == pytest.approx(best, abs=1e-8)  # the programme is the one meant
        else:
            assert value >= best - 1e-9
    assert min(seen.values()) >= 10


@given(st.integers(1, 6), st.integers(2, 30), st.floats(0, 1), st.floats(0.1, 20), st.booleans(), st.booleans(), st.integers(0, 9999))
def test_equals_the_heap(num_queries, num_rows, alpha, C, equal_density, truncated, seed):
    ids, distances, density = instance(num_queries, num_rows, seed, max(2, num_rows // 3) if truncated else None)
    inverse_density = np.ones(num_rows) if equal_density else 1 / density
    found = tsds_probabilities(ids, distances, inverse_density, alpha, C)
    probabilities, s = heap_reference(ids, distances, inverse_density, alpha, C)
    assert found.s == pytest.approx(s, rel=1e-12)
    assert found.probabilities == pytest.approx(probabilities, abs=1e-12)


@given(st.integers(1, 4), st.floats(0.05, 0.95), st.floats(0.2, 10), st.integers(0, 99))
def test_larger_alpha_and_smaller_C_spread_less(num_queries, alpha, C, seed):
    ids, distances, density = instance(num_queries, 20, seed)
    s = tsds_probabilities(ids, distances, 1 / density, alpha, C).s
    assert tsds_probabilities(ids, distances, 1 / density, min(1, 1.3 * alpha), C).s <= s
    assert tsds_probabilities(ids, distances, 1 / density, alpha, C / 2).s <= s


@pytest.mark.parametrize("num_queries", [1, 2])
def test_running_out_of_neighbours_is_not_exact(num_queries):
    ids, distances, density = instance(num_queries, 50, 0, depth=5)
    found = tsds_probabilities(ids, distances, 1 / density, 0.01, 20.0)
    assert not found.exact and found.s < (1 / density).sum() / 2 and found.probabilities.sum() == pytest.approx(1)


def test_one_query_that_runs_out_before_the_others_is_enough():
    ids, distances, density = instance(2, 50, 1)
    whole = tsds_probabilities(ids, distances, 1 / density, 0.5, 2.0)
    ids[0, 2:] = -1
    part = tsds_probabilities(ids, distances, 1 / density, 0.5, 2.0)
    assert whole.exact and not part.exact and part.s < (1 / density).sum() / 2
    assert part.probabilities[ids[0, :2]].sum() == pytest.approx(0.5, abs=0.05) and part.probabilities.sum() == pytest.approx(1)


def test_neighbours_that_were_not_found_get_nothing_and_queries_without_any_do_not_count():
    ids, distances, density = instance(3, 10, 4)
    inverse_density = 1 / density
    short_ids, short_distances = ids[:2].copy(), distances[:2].copy()
    short_ids[:, 6:], short_distances[:, 6:] = -1, math.nan
    with_empty = np.vstack([short_ids, np.full((1, 10), -1)]), np.vstack([short_distances, np.full((1, 10), math.nan)])
    for C in (5.0, 500.0):  # with the larger one both queries run out
        expected = tsds_probabilities(ids[:2, :6], distances[:2, :6], inverse_density, 0.3, C)
        for given_ids, given_distances in ((short_ids, short_distances), with_empty):
            found = tsds_probabilities(given_ids, given_distances, inverse_density, 0.3, C)
            assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-12) and found.s == expected.s
    for empty in (np.full((2, 3), -1), np.empty((2, 0), dtype=np.int64), np.empty((0, 3), dtype=np.int64)):
        nothing = tsds_probabilities(empty, np.zeros(empty.shape), inverse_density, 0.3, 5.0)
        assert nothing.probabilities.tolist() == [0.0] * 10 and not nothing.exact


def test_one_neighbour_each():
    assert tsds_probabilities(np.array([[1], [0], [1]]), np.zeros((3, 1)), np.ones(2), 0.5, 5.0).probabilities == pytest.approx([1 / 3, 2 / 3])


@pytest.mark.parametrize("copies", [2, 5])
def test_the_mass_of_a_group_of_duplicates_is_that_of_one_row(copies):
    rows, queries = unit(60, 8, 0), unit(4, 8, 1)
    settings = {"alpha": 0.5, "C": 5.0, "sigma": 0.05, "max_neighbours": 1000}
    alone = task_probabilities(rows, queries, **settings)
    row = int(alone.probabilities.argmax())
    duplicated = task_probabilities(np.vstack([rows, np.repeat(rows[[row]], copies - 1, 0)]), queries, **settings)
    group = duplicated.probabilities[[row, *range(60, 59 + copies)]]
    assert alone.probabilities[row] < 0.9 and alone.probabilities[row] == pytest.approx(group.sum(), rel=1e-3)
    assert np.delete(duplicated.probabilities[:60], row) == pytest.approx(np.delete(alone.probabilities, row), rel=1e-3)
    without = task_probabilities(np.vstack([rows, np.repeat(rows[[row]], copies - 1, 0)]), queries, **{**settings, "sigma": 0.0})
    assert without.probabilities[[row, *range(60, 59 + copies)]].sum() > 1.2 * alone.probabilities[row]


def test_task_probabilities_from_the_definition():
    rows, queries = unit(150, 6, 2), unit(3, 6, 3)
    distances = np.linalg.norm(queries[:, None] - rows[None], axis=2).astype(np.float64)
    ids = np.argsort(distances, axis=1)[:, :100]
    density = np.maximum(1 - np.linalg.norm(rows[:, None] - rows[None], axis=2) ** 2 / 0.75**2, 0)
    retrieved = np.unique(ids)
    inverse_density = np.zeros(150)
    inverse_density[retrieved] = 1 / density[np.ix_(retrieved, retrieved)].sum(1)
    expected = tsds_probabilities(ids, np.take_along_axis(distances, ids, 1), inverse_density, 0.4, 5.0)
    found = task_probabilities(rows, queries, alpha=0.4)
    assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-5) and found.s == pytest.approx(expected.s, rel=1e-5)


def test_rows_without_an_embedding_get_no_probability():
    rows, queries = unit(40, 6, 2), unit(3, 6, 3)
    some = np.insert(rows, [0, 20], math.nan, axis=0)
    found = task_probabilities(some, queries)
    assert found.probabilities[[0, 21]].tolist() == [0.0, 0.0]
    assert np.delete(found.probabilities, [0, 21]) == pytest.approx(task_probabilities(rows, queries).probabilities, abs=1e-6)
    assert task_probabilities(np.full((5, 6), math.nan), queries).probabilities.tolist() == [0.0] * 5


@pytest.mark.parametrize("block_rows", [7, 50, 1000])
def test_kernel_density_equals_the_definition(block_rows):
    rows = unit(50, 4, 0)
    rows[9] = rows[8]
    for sigma in (0.3, 0.75, 2.0):
        kernel = np.maximum(1 - np.linalg.norm(rows[:, None].astype(np.float64) - rows[None], axis=2) ** 2 / sigma**2, 0)
        assert kernel_density(rows, sigma, block_rows=block_rows) == pytest.approx(kernel.sum(1), abs=1e-4)
    assert (kernel_density(rows, 1e-3, block_rows=block_rows) >= 1).all()  # where rounding of d^2 is a tenth of sigma^2
    assert kernel_density(rows, 0.0).tolist() == [1.0] * 50
    assert len(kernel_density(rows[:0], 0.5)) == 0


def test_kernel_density_counts_duplicates():
    rows = np.repeat(np.eye(4), [1, 2, 3, 4], axis=0)
    assert kernel_density(rows, 0.5, block_rows=3).tolist() == [1, 2, 2, 3, 3, 3, 4, 4, 4, 4]
