"""The evaluation data as the tasks that a selection is made for."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dataflex.train.data.sample_meta import DOMAIN_COLUMN, column_values


class Task(NamedTuple):
    """Rows of a data set that stand for one task."""

    dataset: Any
    rows: np.ndarray


def tasks(eval_dataset: Any) -> list[Task]:
    """One task per data set: of several by name, or told apart by a `domain_id` column; else a single one."""
    if isinstance(eval_dataset, dict):
        return [Task(part, np.arange(len(part))) for part in eval_dataset.values()]
    if DOMAIN_COLUMN in (getattr(eval_dataset, "column_names", None) or []):
        domains = column_values(eval_dataset, DOMAIN_COLUMN)
        return [Task(eval_dataset, np.flatnonzero(domains == domain)) for domain in np.unique(domains)]
    return [Task(eval_dataset, np.arange(len(eval_dataset)))]
