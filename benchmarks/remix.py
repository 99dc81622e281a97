"""What a change of mixture costs with 7 domains and ten million rows: time and peak memory until the first batch's rows are known.

    python benchmarks/remix.py [--rows 10000000] [--interval 25600] [--repetitions 5]

Arms take turns, each in a process of its own, which is where the peak comes from. A "rebuild" draws every row of the next interval, or of a
whole pass, with replacement into a list of (domain, row) tuples and copies it shuffled, as a snapshot data set does. Batches are row numbers;
reading the rows costs the same for every arm and is left out. The time is CPU time, which other programs on the machine disturb least.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dataflex.train.data.mixture_manager import MixtureManager

DOMAIN_SHARES = np.array([0.45, 0.2, 0.15, 0.1, 0.06, 0.03, 0.01])
BEFORE, AFTER = np.full(7, 1 / 7), np.array([0.3, 0.25, 0.15, 0.1, 0.1, 0.05, 0.05])
BATCH = 256

Update = Callable[[], object]


def domain_sizes(rows: int) -> list[int]:
    sizes = (DOMAIN_SHARES * rows).astype(int)
    sizes[0] += rows - sizes.sum()
    return sizes.tolist()


def manager(rows: int, grouped: bool) -> Callable[[], MixtureManager]:
    """What makes a manager: of domains one after the other, or scattered over the data set."""
    sizes = domain_sizes(rows)
    names = [f"domain {number}" for number in range(len(sizes))]
    ids = None if grouped else np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    return lambda: MixtureManager(names, sizes if grouped else None, domain_ids=ids, initial_proportions=BEFORE)


def manager_update(rows: int, interval: int, grouped: bool = True, first: bool = False) -> Update:
    """New proportions, then a plan; unless it is the `first`, the manager has planned an interval before."""
    mixture = manager(rows, grouped)()
    if not first:
        mixture.plan(interval)

    def update() -> np.ndarray:
        mixture.set_proportions(AFTER)
        return mixture.plan(interval)[:BATCH]

    return update


def tuples_update(rows: int, interval: int) -> Update:
    sizes, rng = domain_sizes(rows), np.random.default_rng(0)

    def update() -> list[tuple[int, int]]:
        counts = np.floor(interval * AFTER).astype(int)
        counts[-1] += interval - counts.sum()
        table: list[tuple[int, int]] = []
        for domain, count in enumerate(counts):
            table.extend((domain, row) for row in rng.choice(sizes[domain], size=count, replace=True).tolist())
        table = [table[place] for place in rng.permutation(len(table))]
        return table[:BATCH]

    return update


def numpy_update(rows: int, interval: int) -> Update:
    """A shuffled array of the domain and row of every draw; within a domain a full permutation, repeated as needed."""
    sizes, rng = domain_sizes(rows), np.random.default_rng(0)

    def update() -> tuple[np.ndarray, np.ndarray]:
        counts = np.floor(interval * AFTER).astype(int)
        counts[-1] += interval - counts.sum()
        order = rng.permutation(interval)
        domains = np.repeat(np.arange(len(sizes), dtype=np.uint8), counts)[order]
        local = [np.resize(rng.permutation(size).astype(np.int32), count) for size, count in zip(sizes, counts, strict=True)]
        drawn = np.concatenate(local)[order]
        return domains[:BATCH], drawn[:BATCH]

    return update


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _measure(prepare: Callable[[], Update], connection: multiprocessing.connection.Connection) -> None:
    update = prepare()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
    before, start = _status("VmRSS"), time.process_time()
    update()
    connection.send((time.process_time() - start, (_status("VmHWM") - before) / 2**20))


def measure(prepare: Callable[[], Update]) -> tuple[float, float]:
    """Seconds and MiB of one update in a fresh process."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(prepare, sending))
    process.start()
    result = receiving.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--interval", type=int, default=256 * 100)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    rows, interval = options.rows, options.interval
    arms: dict[str, Callable[[], Update]] = {
        f"MixtureManager, interval of {interval:,}": lambda: manager_update(rows, interval),
        "the same, first interval of a run": lambda: manager_update(rows, interval, first=True),
        "the same, domains scattered over the data set": lambda: manager_update(rows, interval, grouped=False),
        f"rebuild of tuples, interval of {interval:,}": lambda: tuples_update(rows, interval),
        f"rebuild of tuples, pass of {rows:,}": lambda: tuples_update(rows, rows),
        f"NumPy plan from full permutations, interval of {interval:,}": lambda: numpy_update(rows, interval),
        f"NumPy plan from full permutations, pass of {rows:,}": lambda: numpy_update(rows, rows),
        "once per run: making a manager of scattered domains": lambda: manager(rows, grouped=False),
    }
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for _ in range(options.repetitions):
        for name, prepare in arms.items():
            results[name].append(measure(prepare))
    ours = next(iter(results.values()))
    our_memory = statistics.median(memory for _, memory in ours)
    print(f"7 domains, {rows:,} rows; medians of {options.repetitions}.\n")
    print("| update of the mixture | time / ours | memory / ours | milliseconds | MiB |\n| --- | ---: | ---: | ---: | ---: |")
    for name, runs in results.items():
        ratio = statistics.median(run[0] / own[0] for run, own in zip(runs, ours, strict=True))
        seconds, memory = (statistics.median(run[part] for run in runs) for part in (0, 1))
        print(f"| {name} | {ratio:,.1f} | {memory / our_memory:,.1f} | {seconds * 1000:,.1f} | {memory:,.1f} |")


if __name__ == "__main__":
    main()
