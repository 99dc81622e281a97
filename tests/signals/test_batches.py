"""How many tokens of each row are trained on, and batches of a bounded number of tokens."""

import datasets
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dataflex.signals.batches import length_buckets, target_counts

labels = st.lists(st.lists(st.sampled_from([-100, 1, 2]), max_size=6), min_size=1, max_size=8)


def as_rows(labels):
    return [{"input_ids": [1] * len(row), "labels": row} for row in labels]


@given(labels)
def test_targets_are_the_labels_that_something_predicts(labels):
    expected = [sum(label != -100 for label in row[1:]) for row in labels]
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int64")), "labels": datasets.List(datasets.Value("int64"))})
    table = datasets.Dataset.from_list(as_rows(labels), features=features)
    assert target_counts(table).tolist() == expected
    assert target_counts(as_rows(labels)).tolist() == expected
    backwards = np.arange(len(labels))[::-1]
    assert target_counts(table.select(backwards)).tolist() == expected[::-1]  # rows that are not stored in this order


def test_without_labels_every_token_counts():
    assert target_counts(datasets.Dataset.from_list([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])).tolist() == [3, 1]


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 100), st.integers(1, 8))
def test_every_row_is_in_one_batch_that_keeps_to_the_budget(lengths, budget, max_rows):
    lengths = np.array(lengths, dtype=np.int64)
    batches = length_buckets(lengths, budget, max_rows)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or (len(batch) <= max_rows and len(batch) * lengths[batch].max() <= budget)
    if len(lengths):
        assert lengths[batches[0]].max() == lengths.max()


def test_a_row_over_the_budget_is_a_batch_of_its_own():
    assert [batch.tolist() for batch in length_buckets(np.array([3, 100, 2]), 10)] == [[1], [0, 2]]
    assert length_buckets(np.zeros(0, dtype=np.int64), 10) == []
