"""What a component promises about its weights, looked at where values leave the device anyway, so that no step waits for it."""

from __future__ import annotations

import math
from typing import Literal

import torch

from dataflex.errors import ComponentError
from dataflex.utils.distributed import gather_rows

MeanScope = Literal["micro_batch", "step"]
_LOWEST = -1e-5  # what rounding may make of 0
_TOLERANCE = 0.01  # of a mean of 1
_SCOPES = {"micro_batch": "the micro-batch", "step": "the optimizer step"}


class WeightContract:
    """Collects, on the device, the smallest weight and the sums over each scope; `verify` looks at them.

    `verify` is called at every log line, before every checkpoint, at the end of training and after the first step with weights, so that most
    mistakes cost no step at all.
    """

    def __init__(self, owner: str, mean_scope: MeanScope | None = None, finite: bool = False, first_step: int = 0):
        """
        Args:
            owner: what gives the weights, as messages name it.
            mean_scope: samples on all ranks over which the weights have mean 1; None: not promised.
            finite: whether weights that are not finite are an error here.
            first_step: optimizer steps done so far.
        """
        self.owner, self.mean_scope, self.finite, self.verified_to = owner, mean_scope, finite, first_step
        self._begun = False
        self._extremes: torch.Tensor | None = None  # largest -w, and whether a weight is not finite
        self._open: torch.Tensor | None = None  # of the scope under way: sum of weights, samples, samples whose loss is not finite
        self._closed: list[torch.Tensor] = []

    def add(self, weights: torch.Tensor, losses: torch.Tensor | None = None) -> None:
        """Count detached weights and, for the mean, the samples' losses (n,) of a micro-batch."""
        device = weights.device
        if self._extremes is None:
            self._extremes = torch.full((2,), -math.inf, dtype=torch.float64, device=device)
        if weights.numel():
            negative = (-weights.double()).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).max()
            self._extremes = torch.maximum(self._extremes, torch.stack([negative, (~torch.isfinite(weights)).any().double()]))
        if self.mean_scope is not None and losses is not None:
            sums = torch.stack([weights.double().sum(), torch.ones_like(losses).double().sum(), (~torch.isfinite(losses)).double().sum()])
            self._open = sums if self._open is None else self._open + sums

    def close(self, scope: MeanScope) -> None:
        """A micro-batch, or an optimizer step, is over; on every rank."""
        if scope == self.mean_scope:
            self._closed.append(torch.zeros(3, dtype=torch.float64) if self._open is None else self._open)
            self._open = None
            if len(self._closed) > 256:  # few tensors, however far apart log lines are
                self._closed = [torch.cat([part.to(self._closed[0].device) for part in self._closed])]

    def verify_first(self, step: int) -> None:
        """`verify` at the first of all calls: the one time that a step waits, before weights that are wrong have changed anything."""
        if not self._begun:
            self._begun = True
            self.verify(step)

    def verify(self, step: int) -> None:
        """Raise when a weight was negative, or a mean other than promised, up to the end of optimizer step `step`. All ranks must call.

        Raises:
            ComponentError: naming the component, what was expected and the steps.
        """
        steps = f"in steps {self.verified_to + 1} to {step}" if step > self.verified_to + 1 else f"in step {step}"
        extremes = torch.full((2,), -math.inf, dtype=torch.float64) if self._extremes is None else self._extremes.cpu()
        lowest, not_finite = gather_rows(extremes, "the weights").amax(0).tolist()
        mean = self._worst_mean()
        self._extremes, self._closed, self.verified_to = None, [], step
        if -lowest < _LOWEST:
            raise ComponentError(
                f"{self.owner} gave weights down to {-lowest:.4g} {steps}: a weight must be 0 or more, since a negative one trains the model "
                "away from its sample (gradient ascent)"
            )
        if self.finite and not_finite > 0:
            raise ComponentError(f"{self.owner} gave weights that are not finite {steps}")
        if mean is not None and self.mean_scope is not None:
            raise ComponentError(
                f"{self.owner} gave weights of mean {mean:.4g} {steps}, where mean_scope = '{self.mean_scope}' promises mean 1 over the samples of "
                f"{_SCOPES[self.mean_scope]} on all ranks: divide them by their mean, or set mean_scope = None"
            )

    def _worst_mean(self) -> float | None:
        """The mean farthest from 1, unless all are close to it. Scopes with a loss that is not finite do not count."""
        if self.mean_scope is None:
            return None
        own = torch.cat([part.cpu() for part in self._closed]) if self._closed else torch.zeros(0, dtype=torch.float64)
        sums = gather_rows(own.view(-1, 3), "the weights").sum(0)
        sums = sums[(sums[:, 1] > 0) & (sums[:, 2] == 0)]
        means = sums[:, 0] / sums[:, 1]
        means = means[(means - 1).abs() > _TOLERANCE]
        return float(means[(means - 1).abs().argmax()]) if len(means) else None
