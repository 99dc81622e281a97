"""Order of rows, identity of samples, fingerprints."""

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataflex.errors import TrainingError
from dataflex.testing.tiny import pad_collator, tiny_rows
from dataflex.train.data.fingerprint import dataset_fingerprint
from dataflex.train.data.index_stream import IndexedRows, IndexStream, Place, RankBatches
from dataflex.train.data.sample_meta import META, MetaCollator, build_meta, document_lengths
from dataflex.train.trainer.features import pooled_features


def order(epoch):
    return np.random.default_rng(epoch).permutation(11)


def taken(stream, number):
    upcoming = stream.upcoming()
    for _ in range(number):
        yield next(upcoming)[1].tolist()
        stream.advance()


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 5))
def test_every_epoch_covers_every_row_once_on_any_number_of_ranks(size, world, epochs):
    stream = IndexStream(order, size * world)
    shares = [iter(RankBatches(stream, rank, world)) for rank in range(world)]
    for epoch in range(epochs):
        places = [place for _ in range(stream.micro_batches_per_epoch()) for share in shares for place in next(share) if place.counts]
        seen = [place.row for place in places]
        assert {place.epoch for place in places} == {epoch}
        assert seen == order(epoch).tolist()


@given(st.integers(1, 12), st.integers(0, 20))
def test_position_is_restored(size, steps):
    whole, first, second = (IndexStream(order, size) for _ in range(3))
    everything = list(taken(whole, steps + 5))
    list(taken(first, steps))
    second.load_state_dict(first.state_dict())
    assert list(taken(second, 5)) == everything[steps:]


def test_reading_ahead_does_not_move_the_position():
    stream = IndexStream(order, 4)
    upcoming = stream.upcoming()
    for _ in range(5):
        next(upcoming)
    assert stream.state_dict() == {"epoch": 0, "row": 0}


def test_drop_last_leaves_out_the_ragged_end():
    assert [len(ids) for ids in taken(IndexStream(order, 4, drop_last=True), 4)] == [4, 4, 4, 4]


def test_a_rank_without_rows_gets_one_that_does_not_count():
    stream = IndexStream(lambda epoch: np.arange(9), 8)
    rows = tiny_rows(9)
    loaded = IndexedRows(rows, 0)
    collate = MetaCollator(pad_collator, None, 0)
    stream.advance()
    batches = [next(iter(RankBatches(stream, rank, 2))) for rank in range(2)]
    metas = [collate(loaded.__getitems__(batch))[META] for batch in batches]
    assert [meta.num_samples for meta in metas] == [0, 1]
    assert metas[0].num_without_targets == 0


@pytest.mark.parametrize(
    ("row", "lengths"),
    [
        ({"input_ids": [1] * 5}, [5]),
        ({"input_ids": [1] * 5, "attention_mask": [1] * 5}, [5]),
        ({"input_ids": [1] * 5, "seq_lengths": [2, 3]}, [2, 3]),
        ({"input_ids": [1] * 6, "attention_mask": [1, 1, 2, 2, 2, 0]}, [2, 3]),
        ({"input_ids": [1] * 5, "position_ids": [0, 1, 2, 0, 1]}, [3, 2]),
    ],
)
def test_document_lengths(row, lengths):
    assert document_lengths(row) == lengths


def test_meta_of_padded_rows_on_either_side():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8, 9], "labels": [-100, -100]},
        {"input_ids": [1, 2], "labels": [-100, 2]},
    ]
    right = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0], [1, 2, 0]]),
        "labels": torch.tensor([[-100, 6, 7], [-100] * 3, [-100, 2, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]]),
    }
    left = {
        "input_ids": torch.tensor([[5, 6, 7], [0, 8, 9], [0, 1, 2]]),
        "labels": torch.tensor([[-100, 6, 7], [-100] * 3, [-100, -100, 2]]),
        "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1], [0, 1, 1]]),
    }
    for batch in (right, left):
        meta = build_meta([10, 11, 12], rows, batch, domains=np.arange(20) % 4)
        assert meta.sample_ids.tolist() == [10, 12]
        assert meta.domain_ids.tolist() == [2, 0]
        assert meta.counts.tolist() == [2, 1]
        assert meta.targets.tolist() == [6, 7, 2]
        assert meta.num_without_targets == 1
        assert [(meta.token_samples == k).sum().item() for k in range(2)] == [3, 2]


def test_meta_of_a_packed_row_gives_a_loss_to_the_document_of_its_target():
    rows = [{"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5], "seq_lengths": [2, 3]}]
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4, 5]]), "labels": torch.tensor([[-100, 2, -100, 4, 5]])}
    meta = build_meta([7], rows, batch)
    assert meta.sample_ids.tolist() == [7, 7]
    assert meta.counts.tolist() == [1, 2]
    assert meta.positions.tolist() == [0, 2, 3]


def test_meta_of_flattened_rows():
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4, 5], "labels": [3, 4, 5]}]
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4, 5]]), "labels": torch.tensor([[-100, 2, -100, 4, 5]])}
    meta = build_meta([0, 1], rows, batch)
    assert (meta.sample_ids.tolist(), meta.counts.tolist()) == ([0, 1], [1, 2])


def test_a_batch_that_cannot_be_traced_back_is_an_error():
    rows = tiny_rows(3)
    batch = pad_collator(rows[:2])
    with pytest.raises(TrainingError, match="made 2 rows out of 3"):
        build_meta([0, 1, 2], rows, batch)
    with pytest.raises(TrainingError, match="no labels"):
        build_meta([0], rows[:1], {"input_ids": torch.zeros(1, 4)})


def test_the_collator_neither_reads_nor_moves_global_generators():
    def noisy(rows):
        return {**pad_collator(rows), "noise": torch.rand(2)}

    collate = MetaCollator(noisy, None, 3)
    rows = tiny_rows(2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    places = [Place(0, 0), Place(0, 1)]
    first = collate([(places[0], rows[0]), (places[1], rows[1])])["noise"]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, collate([(places[0], rows[0]), (places[1], rows[1])])["noise"])
    assert not torch.equal(first, collate([(Place(1, 0), rows[0]), (Place(1, 1), rows[1])])["noise"])  # another epoch, another draw


def test_pooling_counts_positions_within_a_sample():
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    padded = pad_collator([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows])
    meta = build_meta([0, 1], rows, padded)
    hidden = torch.eye(3).expand(2, 3, 3)
    first = torch.tensor([1.0, 2.0, 3.0]) / 14**0.5
    second = torch.tensor([1.0, 2.0, 0.0]) / 5**0.5
    assert torch.allclose(pooled_features(hidden, meta), torch.stack([first, second]), atol=1e-6)
    assert torch.allclose(pooled_features(hidden, meta, "last"), torch.eye(3)[[2, 1]], atol=1e-6)
    flat = {"input_ids": torch.tensor([[1, 2, 3, 4, 5]]), "labels": torch.tensor([[1, 2, 3, -100, 5]])}
    flattened = build_meta([0, 1], rows, flat)
    packed = pooled_features(torch.cat([torch.eye(3), torch.eye(3)[:2]])[None], flattened)
    assert torch.allclose(packed, torch.stack([first, second]), atol=1e-6)


def test_fingerprint_depends_on_content_and_length():
    rows = tiny_rows(5)
    base = dataset_fingerprint(datasets.Dataset.from_list(rows))
    assert base == dataset_fingerprint(datasets.Dataset.from_list(tiny_rows(5)))
    changed = [*rows[:4], {**rows[4], "labels": [-100] * len(rows[4]["labels"])}]
    assert base != dataset_fingerprint(datasets.Dataset.from_list(changed))
    assert base != dataset_fingerprint(datasets.Dataset.from_list(rows[:4]))
    assert dataset_fingerprint(rows) != dataset_fingerprint(changed)


def test_fingerprint_does_not_depend_on_how_rows_are_kept():
    rows = tiny_rows(30)
    kept = [k for k in range(30) if k % 7 != 3]
    selected = datasets.Dataset.from_list(rows).select(kept)  # every row a chunk of its own
    assert dataset_fingerprint(selected) == dataset_fingerprint(datasets.Dataset.from_list([rows[k] for k in kept]))
