"""Positions in the training data and numbers in the user's data: against brute force, and what is refused."""

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.core.row_numbers import ROW_COLUMN, RowNumbers, Source
from dataflex.core.row_table import HELD_OUT, RowTable, joined
from dataflex.errors import ConfigError

SOURCES = [Source("a:b", 4), Source("c", 6)]
single = st.lists(st.integers(0, 9), min_size=1, max_size=12)
packed = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=6)


def numbers_of(column, **kwargs) -> RowNumbers:
    return RowNumbers.of_dataset(datasets.Dataset.from_dict({ROW_COLUMN: column}), **{"sources": SOURCES, **kwargs})


@settings(deadline=None, max_examples=60)
@given(column=st.one_of(single, packed), data=st.data())
def test_translation_equals_brute_force(column, data):
    numbers = numbers_of(column)
    lists = [row if isinstance(row, list) else [row] for row in column]
    positions = data.draw(st.lists(st.integers(0, len(column) - 1), max_size=8))
    wanted = data.draw(st.lists(st.integers(0, 9), max_size=10))
    assert numbers.of(np.array(positions, dtype=int)).tolist() == [number for position in positions for number in lists[position]]
    assert numbers.positions(np.array(wanted, dtype=int)).tolist() == [p for p, row in enumerate(lists) if set(row) <= set(wanted)]
    kept = sorted({number for row in lists for number in row})
    assert numbers.kept().tolist() == kept
    first = [next(p for p, row in enumerate(lists) if number in row) for number in kept]
    assert numbers.first_positions(np.array(kept)).tolist() == first
    assert numbers.total == 10


@settings(deadline=None, max_examples=60)
@given(column=single, data=st.data())
def test_order_and_values_of_rows(column, data):
    numbers = numbers_of(column)
    order = data.draw(st.permutations(range(10)))
    expected = [p for number in order for p, own in enumerate(column) if own == number]
    assert numbers.in_order(np.array(order)).tolist() == expected
    values = np.arange(10.0) * 3
    assert numbers.per_row(values, "embeddings_file").tolist() == [3.0 * own for own in column]


def test_documents_of_packed_rows():
    numbers = numbers_of([[3, 5], [7], [7, 8, 9]])
    assert numbers.packed
    assert numbers.of_documents(np.array([0, 0, 1, 2, 2]), np.array([0, 1, 0, 2, 9])).tolist() == [3, 5, 7, 9, 9]


def test_what_a_user_may_write():
    numbers = numbers_of([0, 2, 9])
    assert numbers.read([9, 2, 2], "pool").tolist() == [2, 9]
    assert numbers.read(["a:b:3", "c:0", "7"], "pool").tolist() == [3, 4, 7]
    assert numbers.read([1, "c:5"], "pool").tolist() == [1, 9]
    assert numbers.read(np.arange(10) % 5 == 2, "pool").tolist() == [2, 7]
    assert [numbers.label(number) for number in (0, 3, 4, 9)] == ["a:b:0", "a:b:3", "c:0", "c:5"]
    assert numbers_of([0, 2], sources=[Source("alone", 4)]).label(2) == "2"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([10], "from 10 to 10, and there are 10, numbered from 0 (of which 3 are trained on)"),
        ([-1], "from -1"),
        (np.ones(3, dtype=bool), "says yes or no to 3 rows, and there are 10"),
        (["c:6"], "names row 6 of 'c', which has 6 rows"),
        (["d:1"], "'d:1' is not a row: write its number, or 'name:row'"),
        (["a:c:1"], "Did you mean 'a:b'?"),
        ([1.5], "must be a list of row numbers"),
        ([[1]], "must be a list of row numbers"),
    ],
)
def test_rows_that_are_refused(rows, message):
    with pytest.raises(ConfigError) as caught:
        numbers_of([0, 2, 9]).read(rows, "pool")
    assert message in str(caught.value)


def test_unknown_and_packed_rows_are_no_input():
    unknown = RowNumbers(None, 5, unknown="the host packs")
    with pytest.raises(ConfigError, match="the host packs"):
        unknown.read([1], "candidate_pool")
    assert unknown.of(np.array([4, 1])).tolist() == [4, 1]
    with pytest.raises(ConfigError, match="packing: false"):
        numbers_of([[0, 1], [2]]).per_row(np.zeros(10), "embeddings_file")


def test_the_table_says_what_is_trained_on_and_why_not(tmp_path):
    import pyarrow as pa

    def part(name, reasons):
        table = pa.table({"row": np.arange(len(reasons)), "dataset": [name] * len(reasons), "reason": pa.array(reasons, pa.string())})
        return RowTable([Source(name, len(reasons) + 1)], table)  # one more than was read

    table = joined([part("a", [None, "malformed", None]), part("b", [None, None])])
    table.hold_out(np.array([2]))
    table.write(tmp_path, RowNumbers(np.array([0, 4]), 2, sources=table.sources))
    found = pq.read_table(tmp_path / "dataflex" / "rows.parquet").to_pylist()
    assert [(row["row"], row["kept"], row["reason"]) for row in found] == [
        (0, True, None),
        (1, False, "malformed"),
        (2, False, HELD_OUT),
        (4, True, None),
        (5, False, "left out by the host"),
    ]
