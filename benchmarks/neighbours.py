"""What NEAR and TSDS cost after the embeddings are there: this package beside faiss used as DataFlex 1.1.0 uses it.

    OMP_NUM_THREADS=1 python benchmarks/neighbours.py [--rows 100000] [--queries 100] [--k 1000] [--repetitions 5]

Rows are unit vectors of 384 dimensions in 200 clusters; queries lie in 20 of these, as those of a task would. Arms run one after the other,
again and again; the ratio of each repetition is taken within it, and the median reported. The time is CPU time, which other programs on the
machine disturb least.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch

from dataflex.functional.neighbours import nearest, nearest_with_faiss
from dataflex.functional.ranking import round_robin
from dataflex.functional.transport import kernel_density, tsds_probabilities

DIMENSIONS, CLUSTERS, QUERY_CLUSTERS, NOISE = 384, 200, 20, 0.05
ALPHA, C, SIGMA = 0.5, 5.0, 1.0  # with the default sigma, 0.75, no two of these rows count as near-duplicates


class Arm(NamedTuple):
    """One way to do a step: what it is compared with ("" for the base itself), how to run it, and what its result is worth."""

    base: str
    run: Callable[[], Any]
    quality: Callable[[Any], str]


def clustered(number: int, clusters: int, seed: int) -> np.ndarray:
    """Unit vectors (number, DIMENSIONS) around the first `clusters` of the centres, which are the same for every seed."""
    centres = np.random.default_rng(0).standard_normal((CLUSTERS, DIMENSIONS)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    features = centres[rng.integers(0, clusters, number)] + NOISE * rng.standard_normal((number, DIMENSIONS)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def ivf_as_peer(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and squared distances: sqrt(N)/2 lists, of which 10 are searched."""
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(DIMENSIONS), DIMENSIONS, max(1, int(np.sqrt(len(rows)) / 2)))
    index.train(rows)
    index.add(rows)
    index.nprobe = 10
    squares, ids = index.search(queries, k)
    return ids, squares


def density_as_peer(rows: np.ndarray, k: int) -> np.ndarray:
    """Densities from the k neighbours that a second index finds; its Python dictionary of distances is left out."""
    ids, squares = ivf_as_peer(rows, rows, k)
    return np.where(ids >= 0, np.maximum(1 - squares / SIGMA**2, 0), 0).sum(1)


def heap(ids: np.ndarray, distances: np.ndarray, inverse_density: np.ndarray) -> np.ndarray:
    """TSDS's probabilities with the heap of the authors' code."""
    (num_queries, depth), inverse = ids.shape, inverse_density[ids]
    queue = [(inverse[i, 0], 0, i) for i in range(num_queries)]
    heapq.heapify(queue)
    accumulated, cost, last, s = distances[:, 0] * inverse[:, 0], np.zeros(num_queries), np.full(num_queries, -1), 0.0
    while queue:
        s, k, i = heapq.heappop(queue)
        cost[i] = distances[i, k + 1] * s - accumulated[i]
        if ALPHA / C * cost.sum() >= (1 - ALPHA) * num_queries:
            break
        last[i] = k
        if k < depth - 2:
            accumulated[i] += distances[i, k + 1] * inverse[i, k + 1]
            heapq.heappush(queue, (s + inverse[i, k + 1], k + 1, i))
    probabilities = np.zeros(len(inverse_density))
    for i in range(num_queries):
        mass = inverse[i, : last[i] + 1] / (num_queries * s)
        probabilities[ids[i, : last[i] + 1]] += mass
        probabilities[ids[i, last[i] + 1]] += 1 / num_queries - mass.sum()
    return probabilities


def arms(num_rows: int, num_queries: int, k: int) -> dict[str, Arm]:
    """The ways to do each step. Steps after the search start from its exact result."""
    rows, queries = clustered(num_rows, CLUSTERS, 1), clustered(num_queries, QUERY_CLUSTERS, 2)
    ids, similarities = nearest(queries, rows, k)
    distances = np.sqrt(np.maximum(2 - 2 * similarities.astype(np.float64), 0))
    retrieved = np.unique(ids)
    density = kernel_density(rows[retrieved], SIGMA)
    inverse_density = np.zeros(num_rows)
    inverse_density[retrieved] = 1 / density
    probabilities = tsds_probabilities(ids, distances, inverse_density, ALPHA, C).probabilities
    among = f"{len(retrieved):,} rows"
    kde_k = min(1000, num_rows // 10)

    def recall(found: tuple[np.ndarray, np.ndarray]) -> str:
        return f"recall {np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found[0], ids, strict=True)]):.3f}"

    def density_error(found: np.ndarray) -> str:
        return f"mean {found.mean():.2f}, largest error {np.max(np.abs(found / density - 1)):.1%}"

    def distance(found: np.ndarray) -> str:
        return f"largest difference {np.abs(found - probabilities).max():.0e}"

    return {
        "search": Arm("", lambda: nearest(queries, rows, k), recall),
        "search, IVF as DataFlex 1.1.0": Arm("search", lambda: ivf_as_peer(queries, rows, k), recall),
        "search, `nearest_with_faiss`": Arm("search", lambda: nearest_with_faiss(queries, rows, k), recall),
        "NEAR after the search: 10,000 rows in turn": Arm("search", lambda: round_robin(ids, 10_000), lambda found: f"{len(found):,} rows"),
        f"TSDS density of {among}": Arm("", lambda: kernel_density(rows[retrieved], SIGMA), density_error),
        f"TSDS density of {among}, IVF as DataFlex 1.1.0": Arm(
            f"TSDS density of {among}", lambda: density_as_peer(rows[retrieved], kde_k), density_error
        ),
        "TSDS probabilities": Arm("", lambda: tsds_probabilities(ids, distances, inverse_density, ALPHA, C).probabilities, distance),
        "TSDS probabilities, heap": Arm("TSDS probabilities", lambda: heap(ids, distances, inverse_density), distance),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 100_000), ("queries", 100), ("k", 1000), ("repetitions", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    ways = arms(options.rows, options.queries, options.k)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    quality: dict[str, str] = {}
    for repetition in range(options.repetitions + 1):
        for name, arm in ways.items():
            start = time.process_time()
            result = arm.run()
            if repetition:  # the first one warms up
                seconds[name].append(time.process_time() - start)
            else:
                quality[name] = arm.quality(result)
    print(f"torch {torch.__version__}, faiss {faiss.__version__}, CPU, {torch.get_num_threads()} threads, {options.repetitions} repetitions")
    print(f"{options.rows:,} rows, {options.queries} queries, {options.k} neighbours, {DIMENSIONS} dimensions\n")
    print("| step | time / this package | seconds | result |\n| --- | ---: | ---: | --- |")
    for name, arm in ways.items():
        ratio = statistics.median(own / base for own, base in zip(seconds[name], seconds[arm.base or name], strict=True))
        print(f"| {name} | {ratio:.2f} | {statistics.median(seconds[name]):.3f} | {quality[name]} |")


if __name__ == "__main__":
    main()
