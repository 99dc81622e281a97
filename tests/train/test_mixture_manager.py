"""The domain sampler: proportions kept, rows not repeated, any position resumable, nothing as large as the data."""

import itertools
import json
import logging
import math
import tracemalloc

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.errors import ComponentError, ConfigError, ResumeError
from dataflex.functional.mixing import quotas
from dataflex.train.data.mixture_manager import MixtureManager

NAMES = ("web", "code", "maths")
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)
lengths = st.lists(st.integers(0, 60), min_size=1, max_size=8)


def manager(sizes, shuffled=False, **options):
    """A manager of domains of these sizes, and the domain of every row."""
    ids = np.repeat(np.arange(len(sizes)), sizes)
    names = [f"domain {number}" for number in range(len(sizes))]
    if not shuffled:
        return MixtureManager(names, sizes, **options), ids
    np.random.default_rng(0).shuffle(ids)
    return MixtureManager(names, domain_ids=ids, **options), ids


def counts_of(rows, ids, k):
    return np.bincount(ids[rows], minlength=k)


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_first_plan_has_largest_remainder_quotas(shuffled):
    mixture, ids = manager([5, 400, 77], shuffled, initial_proportions=(0.55, 0.30, 0.15))
    rows = mixture.plan(10)
    assert rows.dtype == np.int64 and counts_of(rows, ids, 3).tolist() == [6, 3, 1]


@given(sizes, st.booleans(), lengths)
@settings(deadline=None)
def test_a_stratified_pass_holds_every_row_once_however_it_is_split(sizes, shuffled, lengths):
    mixture, _ = manager(sizes, shuffled, sample_rule="stratified")
    total, rows, length = sum(sizes), [], itertools.cycle([*lengths, 7])
    while len(rows) < 3 * total:
        rows += mixture.plan(next(length)).tolist()
    for start in range(0, 3 * total, total):
        assert sorted(rows[start : start + total]) == list(range(total))


@given(sizes, lengths, st.booleans())
@settings(deadline=None)
def test_within_a_domain_no_row_comes_up_twice_before_all_have_come_up(sizes, lengths, shuffled):
    mixture, ids = manager(sizes, shuffled, initial_proportions=np.arange(1, len(sizes) + 1))
    rows = np.concatenate([mixture.plan(length) for length in lengths])
    assert len(rows) == sum(lengths)
    for domain, size in enumerate(sizes):
        own = rows[ids[rows] == domain]
        assert len(own) == mixture.drawn[domain]
        for start in range(0, len(own), size):
            assert len(set(own[start : start + size])) == len(own[start : start + size])


@given(sizes, lengths, st.integers(0, 8), st.sampled_from(["mixture", "stratified", "uniform"]), st.booleans())
@settings(deadline=None)
def test_resuming_at_any_point_gives_the_same_continuation(sizes, lengths, stop, rule, shuffled):
    def run(mixture, numbers):
        plans = []
        for number in numbers:
            if rule == "mixture":
                mixture.set_proportions(np.random.default_rng(number).random(mixture.k) + 0.01)
            plans.append(mixture.plan(lengths[number]).tolist())
        return plans

    numbers, stop = range(len(lengths)), min(stop, len(lengths))
    whole, first, second = (manager(sizes, shuffled, sample_rule=rule)[0] for _ in range(3))
    expected = run(whole, numbers)
    begun = run(first, numbers[:stop])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + run(second, numbers[stop:]) == expected
    assert np.array_equal(second.proportions, whole.proportions)


@given(st.integers(1, 6), st.lists(st.tuples(st.integers(0, 50), st.integers(0, 99)), min_size=1, max_size=40))
@settings(deadline=None)
def test_rounding_does_not_accumulate_while_proportions_change(k, updates):
    mixture, _ = manager([1000] * k)
    expected = np.zeros(k)
    for length, seed in updates:
        mixture.set_proportions(np.random.default_rng(seed).dirichlet(np.ones(k)) + 1e-3)
        expected += length * mixture.proportions
        mixture.plan(length)
    assert mixture.drawn.sum() == sum(length for length, _ in updates)
    assert (mixture.drawn < expected + 1).all()


def test_a_share_of_less_than_a_row_per_plan_is_served_in_the_long_run():
    mixture, _ = manager([100, 100], initial_proportions=(0.99, 0.01))
    for _ in range(100):
        mixture.plan(8)
    assert mixture.drawn.tolist() == [792, 8]


@pytest.mark.parametrize("k", [4, 6])
def test_a_domain_without_a_share_is_never_drawn_whatever_it_is_owed(k):
    mixture, ids = manager([10] * k, initial_proportions=[1.1, 1.1, *[1] * (k - 2)])
    assert counts_of(mixture.plan(2), ids, k).tolist() == [1, 1, *[0] * (k - 2)]  # the others are owed up to half a row
    mixture.set_proportions([1, 1, *[0] * (k - 2)])
    assert counts_of(mixture.plan(1), ids, k).tolist() == [1, *[0] * (k - 1)]  # with k = 6 although both domains with a share are ahead
    assert counts_of(mixture.plan(41), ids, k).tolist() == [20, 21, *[0] * (k - 2)]


def test_a_domain_never_seen_keeps_its_place():
    mixture, _ = manager([30, 30], initial_proportions=(0, 1))
    mixture.plan(50)
    assert mixture.drawn.tolist() == [0, 50]
    mixture.set_proportions((1, 0))
    untouched, _ = manager([30, 30], initial_proportions=(1, 0))
    assert mixture.plan(20).tolist() == untouched.plan(20).tolist()


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.integers(8, 64))
@settings(deadline=None)
def test_every_batch_has_nearly_the_mixture_of_the_plan(counts, batch):
    mixture, ids = manager([50] * len(counts), initial_proportions=counts)
    rows = mixture.plan(sum(counts))
    drawn = np.cumsum(np.eye(len(counts))[ids[rows]], axis=0)
    assert drawn[-1].tolist() == counts
    shares = np.array(counts) / sum(counts)
    # Proved: a domain is within a row of its count at any time, and time is off by what the other domains' rows are off.
    assert (np.abs(drawn - np.arange(1, len(rows) + 1)[:, None] * shares) <= 1 + shares * len(counts)).all()


def test_a_large_domain_among_many_small_ones_fills_every_batch_evenly():
    mixture, ids = manager([1000, *[10] * 50], initial_proportions=[500, *[10] * 50])
    of_large = (ids[mixture.plan(3200)] == 0).reshape(-1, 32).sum(1)
    assert of_large.min() >= 15 and of_large.max() <= 17  # shuffled, it would range over about 16 +- 8


def test_ten_rows_beside_ten_million_need_neither_time_nor_memory_for_the_large_one():
    tracemalloc.start()
    mixture = MixtureManager(("small", "large"), (10, 10_000_000))
    rows = mixture.plan(1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6  # one byte for each row would be ten times that
    small, large = rows[rows < 10], rows[rows >= 10]
    assert np.bincount(small).tolist() == [50] * 10
    assert len(np.unique(large)) == 500 and large.max() < 10_000_010 and np.ptp(large) > 9_000_000


def test_proportions_of_tokens():
    mixture, ids = manager([100, 100], mixture_unit="token", mean_tokens=(300, 100), initial_proportions=(0.5, 0.5))
    assert mixture.proportions.tolist() == [0.5, 0.5]
    assert counts_of(mixture.plan(40), ids, 2).tolist() == [10, 30]  # 3000 tokens each


def test_stratified_goes_by_rows_in_either_unit():
    mixture, _ = manager([30, 10], mixture_unit="token", mean_tokens=(1, 7), sample_rule="stratified")
    assert mixture.proportions.tolist() == [0.3, 0.7]
    assert sorted(mixture.plan(40)) == list(range(40))


@pytest.mark.parametrize(("rule", "expected"), [("uniform", [8, 8]), ("stratified", [12, 4])])
def test_fixed_rules_ignore_the_mixer_and_say_so_once(rule, expected, caplog):
    mixture, ids = manager([30, 10], sample_rule=rule)
    with caplog.at_level(logging.WARNING, logger="dataflex"):
        mixture.set_proportions((0, 1))
        mixture.set_proportions((0, 1))
    assert counts_of(mixture.plan(16), ids, 2).tolist() == expected
    assert len(caplog.records) == 1 and "mixture_sample_rule" in caplog.text


def test_what_mixers_read():
    mixture = MixtureManager(NAMES, domain_ids=np.array([2, 0, 0, 1, 2, 2]))
    assert (mixture.names, mixture.k, mixture.sizes.tolist()) == (list(NAMES), 3, [2, 1, 3])
    assert mixture.proportions.tolist() == pytest.approx([1 / 3] * 3)
    assert [mixture.domain_indices(domain).tolist() for domain in range(3)] == [[1, 2], [3], [0, 4, 5]]
    assert MixtureManager(NAMES, (2, 1, 3)).domain_indices(2).tolist() == [3, 4, 5]
    mixture.set_proportions([2, 1, 1])
    assert mixture.probs.tolist() == mixture.proportions.tolist() == [0.5, 0.25, 0.25]
    assert mixture.initial_proportions.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("make", [datasets.Dataset.from_list, list])
def test_mixers_may_look_at_the_rows_of_each_domain(make):
    ids = np.array([2, 0, 0, 1, 2, 2])
    mixture = MixtureManager(NAMES, domain_ids=ids, dataset=make([{"domain": int(domain), "row": row} for row, domain in enumerate(ids)]))
    assert {name: [(row["domain"], row["row"]) for row in source] for name, source in mixture.sources.items()} == {
        name: [(domain, int(row)) for row in np.flatnonzero(ids == domain)] for domain, name in enumerate(NAMES)
    }


def test_rows_in_domain_order_need_no_table():
    ids = np.repeat([0, 1, 2], [4, 5, 6])
    assert MixtureManager(NAMES, domain_ids=ids).plan(30).tolist() == MixtureManager(NAMES, (4, 5, 6)).plan(30).tolist()


def test_seeds_and_domains_have_orders_of_their_own():
    one, two, other = (MixtureManager(("a", "b"), (500, 500), seed=seed) for seed in (1, 1, 2))
    rows = one.plan(1000)
    assert np.array_equal(rows, two.plan(1000)) and not np.array_equal(rows, other.plan(1000))
    assert not np.array_equal(rows[rows < 500], rows[rows >= 500] - 500)


def test_a_plan_of_no_rows():
    mixture, _ = manager([3, 4])
    state = mixture.state_dict()
    assert len(mixture.plan(0)) == 0 and mixture.state_dict() == state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": (1, 2)}, "2 numbers for 3 domains"),
        ({"sizes": (1, 0, 2)}, "without rows: code"),
        ({"domain_ids": np.array([0, 1, 3])}, "from 0 to 2"),
        ({"domain_ids": np.array([0, 1, -1])}, "from 0 to 2"),
        ({"domain_ids": np.array([0, 2])}, "without rows: code"),
        ({"sizes": (1, 1, 1), "initial_proportions": (1, 1)}, "init_mixture_proportions: expected 3 proportions"),
        ({"sizes": (1, 1, 1), "initial_proportions": (1, -1, 1)}, "not negative"),
        ({"sizes": (1, 1, 1), "sample_rule": "stratifed"}, "Did you mean 'stratified'"),
        ({"sizes": (1, 1, 1), "mixture_unit": "tokens"}, "Did you mean 'token'"),
        ({"sizes": (1, 1, 1), "mixture_unit": "token"}, "mean tokens per sample"),
        ({"sizes": (1, 1, 1), "mixture_unit": "token", "mean_tokens": (1, 0, 1)}, "each above 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        MixtureManager(NAMES, **options)


@pytest.mark.parametrize("values", [(1, 2), (1, math.nan, 1), (0, 0, 0), ("x", 1, 1), None])
def test_a_bad_mixture_changes_nothing(values):
    mixture = MixtureManager(NAMES, (1, 2, 3), initial_proportions=(1, 2, 1))
    with pytest.raises(ComponentError, match="web, code, maths"):
        mixture.set_proportions(values)
    assert mixture.proportions.tolist() == [0.25, 0.5, 0.25]


def test_state_of_another_number_of_domains():
    with pytest.raises(ResumeError, match="mixes 2 domains, this run 3"):
        MixtureManager(NAMES, (1, 2, 3)).load_state_dict(manager([1, 2])[0].state_dict())


def test_quotas_are_those_of_each_plan_when_nothing_is_owed():
    mixture, ids = manager([50, 50, 50], initial_proportions=(0.5, 0.25, 0.25))
    for n in (4, 8, 400):
        assert counts_of(mixture.plan(n), ids, 3).tolist() == quotas((0.5, 0.25, 0.25), n).tolist()
