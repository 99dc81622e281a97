"""Rows whose instruction helps least with their answer: difficult to follow, yet followed (IFD).

IFD = mean token loss of the answer given the instruction / mean token loss of the answer alone. Rows with IFD >= 1, where the instruction does
not help, are left out; of the others the highest are taken.
Papers: Li et al., "From Quantity to Quality", NAACL 2024, arXiv 2308.12032; with a small model as scorer: Superfiltering, arXiv 2402.00530.
Cost at every decision: two forward passes over the candidates; none with a `file` made offline.
When it fails: ratios of very short answers are noise (`min_tokens`); wrong answers have high ratios too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from pydantic import FilePath

from dataflex.core.registry import register_selector
from dataflex.offline.results import load_result
from dataflex.signals.answers import ifd_scores
from dataflex.train.data.fingerprint import dataset_fingerprint
from dataflex.train.selector.base_selector import Passes, ScoringSelector


@register_selector("ifd")
class IfdSelector(ScoringSelector):
    """Rows whose instruction helps least with their answer, yet helps (IFD, arXiv 2308.12032)."""

    def __init__(self, *args: Any, min_tokens: Annotated[int, Ge(1)] = 5, file: FilePath | None = None, **kwargs: Any):
        """
        Args:
            min_tokens: answers with fewer tokens are never chosen.
            file: result of `dataflex-cli offline ifd` for this data set; nothing is computed during training.
        """
        self.needs_model = file is None
        super().__init__(*args, **kwargs)
        self.min_tokens, self.file = min_tokens, file
        self.result: np.ndarray | None = None
        if self.dataset is not None:
            self.prepare()

    def prepare(self) -> None:
        super().prepare()
        if self.file is not None:
            self.result = load_result(self.file, "ifd", fingerprint=dataset_fingerprint(self.dataset), numbers=self._numbers())

    @classmethod
    def passes(cls, params: Mapping[str, Any]) -> Passes:
        return Passes() if params.get("file") else Passes(forward=2)

    def scores(self, rows: np.ndarray, *, ctx: Any, **kwargs: Any) -> np.ndarray:
        if self.result is not None:
            return self.result[rows]
        return ifd_scores(ctx.signals, ctx.train_dataset, rows, self.min_tokens)
