"""How much an instruction helps with its answer: losses of answers with and without what precedes them."""

from __future__ import annotations

from typing import Any

import numpy as np


class AnswersAlone:
    """A data set's rows without the tokens that carry no label, behind one token that starts them."""

    def __init__(self, dataset: Any, start: int, fingerprint: str):
        """
        Args:
            start: the token in front, from which the first token of the answer is predicted.
            fingerprint: of `dataset`.
        """
        self.dataset, self.start, self.fingerprint = dataset, start, f"answers alone, {start}, {fingerprint}"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        # The very tokens of the whole row: encoding the text anew could cut it differently at its beginning.
        targets = targets_of(self.dataset[index])
        return {"input_ids": [self.start, *targets], "attention_mask": [1] * (len(targets) + 1), "labels": [-100, *targets]}

    def row_lengths(self) -> np.ndarray:
        """Tokens of each row (N,)."""
        return np.array([len(targets_of(self.dataset[index])) + 1 for index in range(len(self))], dtype=np.int64)


def targets_of(row: Any) -> list[int]:
    """The tokens of a row that are predicted: those with a label, except a first token, which nothing precedes."""
    return [int(label) for label in row["labels"][1:] if label != -100]


def ifd_scores(signals: Any, dataset: Any, rows: np.ndarray, min_tokens: int) -> np.ndarray:
    """IFD (n,) of rows: loss of the answer given the instruction over that of the answer alone (arXiv 2308.12032).

    NaN where it is 1 or more, or the answer has fewer than `min_tokens` tokens.
    """
    alone = signals.answers_alone(dataset)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = signals.losses(dataset, rows) / signals.losses(alone, rows)
    lengths = signals.lengths(alone)[rows] - 1
    return np.where((ratio < 1) & (lengths >= min_tokens), ratio, np.nan)
