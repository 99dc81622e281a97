"""Rows whose update of the model agrees with the gradient of the evaluation data (LESS).

score_i = max over tasks of the mean over the task's rows q of cos(Gamma(g_i), g_q), where g is the gradient of a row's mean token loss and
Gamma the update that Adam would make for it: m' / (sqrt(v') + eps), m' = b1 m + (1 - b1) g, v' = b2 v + (1 - b2) g^2.
Paper: Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning", ICML 2024, arXiv 2402.04333. Two things differ: the live
model and optimizer stand in for checkpoints of a warm-up run (`refreshes` averages the last ones, weighted by their learning rates, as the
paper does), and products are exact instead of estimated from random projections.
Cost at every decision: a forward and backward pass over the candidates, and two over the evaluation data.
When it fails: the whole gradient of a model includes directions that all rows share; compare with `rds`, which needs no backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge

from dataflex.core.registry import register_selector
from dataflex.signals.gradients import Preconditioner, scored_parameters
from dataflex.train.selector.base_selector import Passes, ScoringSelector
from dataflex.train.selector.targets import tasks


@register_selector("less")
class LessSelector(ScoringSelector):
    """Rows whose update agrees with the gradient of the evaluation data (LESS, arXiv 2402.04333)."""

    needs_eval_dataset = True
    needs_model = True

    def __init__(
        self,
        *args: Any,
        gradient_type: Literal["adam", "sgd", "sign"] = "adam",
        task_aggregation: Literal["max", "mean"] = "max",
        target: Literal["mean_of_cosines", "cosine_of_mean"] = "mean_of_cosines",
        refreshes: Annotated[int, Ge(1)] = 1,
        include_embeddings: bool = False,
        **kwargs: Any,
    ):
        """
        Args:
            gradient_type: what a candidate's gradient is turned into: the optimizer's update (`adam`), itself (`sgd`) or its `sign`.
            task_aggregation: of several evaluation data sets, the best score counts (`max`), or their mean.
            target: `mean_of_cosines` as in the authors' code, `cosine_of_mean` as in their paper.
            refreshes: average the scores of this many decisions, the present one and those before it.
            include_embeddings: count the embedding and output layers in when they are trained in full. They are large and costly.
        """
        super().__init__(*args, **kwargs)
        self.gradient_type, self.task_aggregation, self.target = gradient_type, task_aggregation, target
        self.refreshes, self.include_embeddings = refreshes, include_embeddings
        self.history: list[tuple[float, np.ndarray]] = []

    @classmethod
    def passes(cls, params: Mapping[str, Any]) -> Passes:
        unit = params.get("target", "mean_of_cosines") == "mean_of_cosines"
        return Passes(backward=1, eval_backward=2 if unit else 1)

    def scores(self, rows: np.ndarray, *, ctx: Any, **kwargs: Any) -> np.ndarray:
        present = self.influence(rows, ctx)
        if self.refreshes == 1:
            return present
        self.history = [*self.history, (float(ctx.lr_scheduler.get_last_lr()[0]), present)][-self.refreshes :]
        rates = np.array([max(rate, 1e-12) for rate, _ in self.history])
        return np.average([scores for _, scores in self.history], axis=0, weights=rates)

    def influence(self, rows: np.ndarray, ctx: Any) -> np.ndarray:
        """Score of each row (n,) under the model and optimizer as they are."""
        signals, unit = ctx.signals, self.target == "mean_of_cosines"
        targets = [
            signals.mean_gradient(task.dataset, task.rows, unit=unit, include_embeddings=self.include_embeddings) for task in tasks(self.eval_dataset)
        ]
        if not unit:
            targets = [_normalized(target) for target in targets]
        preconditioner = Preconditioner.from_optimizer(self.gradient_type, ctx.optimizer, scored_parameters(signals.model, self.include_embeddings))
        products, norms = signals.gradient_products(ctx.train_dataset, rows, targets, preconditioner, self.include_embeddings)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines = products / norms[:, None]  # a row without a gradient gets NaN and is never chosen
        return cosines.max(1) if self.task_aggregation == "max" else cosines.mean(1)

    def state_dict(self) -> dict[str, Any]:
        scores = {f"scores{k}": torch.from_numpy(scores) for k, (_, scores) in enumerate(self.history)}
        return {"rates": [rate for rate, _ in self.history], **scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = [(rate, state[f"scores{k}"].numpy()) for k, rate in enumerate(state["rates"])]


def _normalized(target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    norm = torch.sqrt(sum(((part.double() ** 2).sum() for part in target.values()), torch.zeros((), dtype=torch.float64))).item()
    return {name: part / norm for name, part in target.items()}
