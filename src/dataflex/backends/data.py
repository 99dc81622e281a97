"""The names that code outside DataFlex found in this module before it became the package `datasets`."""

from dataflex.backends.datasets.encode import Encoded, encode_sft, encode_text
from dataflex.backends.datasets.find import find_datasets
from dataflex.backends.datasets.rows import load_rows
from dataflex.backends.datasets.spec import DatasetSpec

__all__ = ["DatasetSpec", "Encoded", "encode_sft", "encode_text", "find_datasets", "load_rows"]
