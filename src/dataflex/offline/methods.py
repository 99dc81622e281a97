"""What `dataflex-cli offline` computes, from a trainer whose signals are asked but which does not train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataflex.errors import ConfigError, Problem
from dataflex.functional.retrieval import Aggregation, near_order, rds_order
from dataflex.functional.transport import task_probabilities
from dataflex.signals.answers import ifd_scores
from dataflex.train.selector.embedded import read_embeddings, same_width, unit
from dataflex.train.selector.targets import tasks
from dataflex.utils.logging import logger


class Embeddings(NamedTuple):
    """Where embeddings come from: the model of the YAML file unless something else is named.

    Attributes:
        pooling: how the model's hidden states become an embedding.
        embedder: name or folder of a sentence-transformers model.
        embeddings_file, query_embeddings_file: `.npy` files.
    """

    pooling: str = "weighted_mean"
    embedder: str | None = None
    embeddings_file: Path | None = None
    query_embeddings_file: Path | None = None


def near(trainer: Any, source: Embeddings, number: int | None) -> np.ndarray:
    """Candidates in the order in which the evaluation data's rows ask for them."""
    features, queries = embedded(trainer, source)
    return near_order(features, np.concatenate(queries), min(number or len(features), len(features)))


def rds(trainer: Any, source: Embeddings, number: int | None, aggregation: Aggregation) -> np.ndarray:
    """Candidates in the order of RDS+."""
    features, queries = embedded(trainer, source)
    return rds_order(features, queries, min(number or len(features), len(features)), aggregation)


def tsds(trainer: Any, source: Embeddings, alpha: float, C: float, sigma: float, max_neighbours: int) -> np.ndarray:
    """Probability of each candidate."""
    features, queries = embedded(trainer, source)
    found = task_probabilities(features, np.concatenate(queries), alpha=alpha, C=C, sigma=sigma, max_neighbours=max_neighbours)
    if not found.exact:
        logger.warning("alpha and C are outside the range in which the solution of tsds is optimal; a smaller C or a larger alpha is inside")
    return found.probabilities


def ifd(trainer: Any, min_tokens: int) -> np.ndarray:
    """IFD of each row; NaN for rows that are never to be chosen."""
    return ifd_scores(trainer.signals, trainer.train_dataset, np.arange(len(trainer.train_dataset)), min_tokens)


def embedded(trainer: Any, source: Embeddings) -> tuple[np.ndarray, list[np.ndarray]]:
    """Unit embeddings of the training rows, and of each task's queries."""
    data, rows = trainer.train_dataset, np.arange(len(trainer.train_dataset))
    if source.embeddings_file is not None and source.query_embeddings_file is not None:
        given = read_embeddings(source.embeddings_file, "--embeddings-file", trainer.row_numbers.total)
        features = unit(trainer.row_numbers.per_row(given, "--embeddings-file"))
        queries = [unit(read_embeddings(source.query_embeddings_file, "--query-embeddings-file"))]
        same_width(features, queries[0])
    else:
        embed = _embedder(trainer, source)
        features = embed(data, rows)
        queries = [embed(task.dataset, task.rows) for task in tasks(trainer.eval_dataset)]
    queries = [found[np.isfinite(found).all(1)] for found in queries]
    if not all(map(len, queries)):
        raise ConfigError(Problem("", "eval_dataset", "has no row with a target token, so there is nothing to compare with"))
    return features, queries


def _embedder(trainer: Any, source: Embeddings) -> Callable[[Any, np.ndarray], np.ndarray]:
    if source.embedder is None:
        return lambda dataset, rows: trainer.signals.embeddings(dataset, rows, source.pooling)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ConfigError(Problem("command line", "--embedder", "needs sentence-transformers: pip install 'dataflex[embed]'")) from None
    model = SentenceTransformer(source.embedder)

    def embed(dataset: Any, rows: np.ndarray) -> np.ndarray:
        texts = [trainer.processing_class.decode(dataset[int(row)]["input_ids"], skip_special_tokens=True) for row in rows]
        return unit(model.encode(texts, show_progress_bar=not trainer.args.disable_tqdm))

    return embed
