"""What selectors in embedding space share: where the embeddings of candidates and queries come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import FilePath

from dataflex.errors import ComponentError
from dataflex.offline.results import load_result
from dataflex.train.data.fingerprint import dataset_fingerprint
from dataflex.train.selector.base_selector import Passes, Selector
from dataflex.train.selector.targets import tasks

Pooling = Literal["weighted_mean", "mean", "last"]


def read_embeddings(path: Path, name: str, num_rows: int | None = None) -> np.ndarray:
    """Embeddings (n, D) from a `.npy` file, mapped into memory.

    Raises:
        ComponentError: it holds something else, or not one row for each of `num_rows`.
    """
    try:
        features = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ComponentError(f"{name} {path} cannot be read: {error}") from None
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
        raise ComponentError(f"{name} {path} must hold floats of shape (rows, dimensions), not {features.dtype} of shape {features.shape}")
    if num_rows is not None and len(features) != num_rows:
        raise ComponentError(f"{name} {path} has {len(features)} rows; the data set has {num_rows}, and every row needs an embedding")
    return features


def same_width(features: np.ndarray, queries: np.ndarray) -> None:
    """Refuse embeddings that cannot be compared.

    Raises:
        ComponentError: candidates and queries have different dimensions.
    """
    if features.shape[1] != queries.shape[1]:
        raise ComponentError(f"candidates have {features.shape[1]} dimensions and queries {queries.shape[1]}: both must come from one model")


def unit(features: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, fp32; NaN for a row without direction."""
    features = np.asarray(features, dtype=np.float32)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return features / norms


class EmbeddedSelector(Selector):
    """Compares embeddings of candidates with those of the evaluation data: the model's own, files, or a result made offline."""

    method: str = ""
    """Name in `dataflex-cli offline`."""

    def __init__(
        self,
        *args: Any,
        pooling: Pooling = "weighted_mean",
        file: FilePath | None = None,
        embeddings_file: FilePath | None = None,
        query_embeddings_file: FilePath | None = None,
        **kwargs: Any,
    ):
        """
        Args:
            pooling: how hidden states become an embedding: `weighted_mean` weights tokens by their position, `mean` equally, `last` takes the last.
            file: result of `dataflex-cli offline` for this data set; nothing is computed during training.
            embeddings_file: `.npy` with an embedding of every row of your data, those that are left out too, instead of the model's.
            query_embeddings_file: `.npy` with embeddings of the queries, instead of the evaluation data.
        """
        self.needs_eval_dataset = file is None and query_embeddings_file is None
        self.needs_model = file is None and (embeddings_file is None or query_embeddings_file is None)
        super().__init__(*args, **kwargs)
        if (embeddings_file is None) != (query_embeddings_file is None):
            missing = "embeddings_file" if embeddings_file is None else "query_embeddings_file"
            raise ComponentError(f"{missing} is missing: embeddings of candidates and queries are only comparable when they come from one model")
        self.pooling, self.file, self.query_embeddings_file = pooling, file, query_embeddings_file
        self.embeddings_file = embeddings_file
        self._features: np.ndarray | None = None
        self._result: np.ndarray | None = None
        if self.dataset is not None:
            self.prepare()

    def prepare(self) -> None:
        super().prepare()
        if self.embeddings_file is not None and self.query_embeddings_file is not None:
            given = read_embeddings(self.embeddings_file, "embeddings_file", self._numbers().total)
            self._features = self._numbers().per_row(given, "embeddings_file")
            same_width(self._features, read_embeddings(self.query_embeddings_file, "query_embeddings_file"))
        if self.file is not None:
            self._result = load_result(self.file, self.method, fingerprint=dataset_fingerprint(self.dataset), numbers=self._numbers())

    @property
    def result(self) -> np.ndarray | None:
        """What `dataflex-cli offline` found, or None without a `file`."""
        return self._result

    @classmethod
    def uses_eval_dataset(cls, params: Mapping[str, Any]) -> bool:
        return not (params.get("file") or params.get("query_embeddings_file"))

    @classmethod
    def passes(cls, params: Mapping[str, Any]) -> Passes:
        return Passes(forward=1, eval_forward=1) if cls.uses_eval_dataset(params) else Passes()

    def candidates(self, rows: np.ndarray, ctx: Any) -> np.ndarray:
        """Unit embeddings (n, D) of rows of the training data; NaN where there is none."""
        if self._features is not None:
            return unit(self._features[rows])
        return ctx.signals.embeddings(ctx.train_dataset, rows, self.pooling)

    def queries(self, ctx: Any) -> list[np.ndarray]:
        """Unit embeddings (Q, D) of the queries of each task."""
        if self.query_embeddings_file is not None:
            found = [unit(read_embeddings(self.query_embeddings_file, "query_embeddings_file"))]
        else:
            found = [ctx.signals.embeddings(task.dataset, task.rows, self.pooling) for task in tasks(self.eval_dataset)]
        found = [features[np.isfinite(features).all(1)] for features in found]
        if not all(map(len, found)):
            raise ComponentError("a task of the evaluation data has no row with a target token, so there is nothing to compare with")
        return found
