"""Domains that are being learned fastest more often, by scaling laws fitted to their training losses (ADO).

loss_j(n) = eps_j + beta_j n^-a_j after n samples; the preference for domain j is prior_j * sqrt(recent share_j) * a_j (loss_j - eps_j) / n. The
mixture is `inertia` times the mean of the preferences of all steps before, the prior's before the first fit, and for the rest the present one.
Paper: Jiang et al., "Adaptive Data Optimization: Dynamic Sample Selection with Scaling Laws", ICLR 2025, arXiv 2410.11820.
Cost: none during training; a fit takes milliseconds.
When it fails: before the losses have settled into their laws; `start_step` leaves the first steps out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt

from dataflex.core.registry import register_mixer
from dataflex.functional.mixing import AdoState, ScalingLaw, ado_step, fit_scaling_law, proportions
from dataflex.train.mixer.base_mixer import DomainLosses, Mixer

_MAX_POINTS = 10_000


@register_mixer("ado")
class AdoMixer(Mixer):
    """Domains that are being learned fastest more often (ADO, arXiv 2410.11820)."""

    def __init__(
        self,
        mixture_manager: Any = None,
        *,
        start_step: Annotated[int, Ge(0)] = 500,
        refit_step: Annotated[int, Ge(1)] = 1000,
        prior: Literal["size", "initial"] = "size",
        decay: Annotated[float, Ge(0), Lt(1)] = 0.9,
        inertia: Annotated[float, Ge(0), Lt(1)] = 0.9,
        min_share: Annotated[float, Gt(0), Lt(1)] = 0.01,
        min_log_eps: float = -3.0,
        **kwargs: Any,
    ):
        """
        Args:
            start_step: optimizer steps whose losses are left out of the fits; until then the mixture stays as it is.
            refit_step: optimizer steps from one fit to the next, at most; early ones come when the number of points has doubled.
            prior: the natural mixture: by `size` of the domains, or the `initial` proportions.
            decay: of the moving average of the domains' shares of a step.
            inertia: weight of the mean of earlier preferences in the mixture.
            min_share: smallest share of a domain.
            min_log_eps: lower bound of log eps. The paper's 0.5 supposes losses above 1.65, which those of instruction data are not.
        """
        super().__init__(mixture_manager, **kwargs)
        self.start_step, self.refit_step, self.decay, self.inertia = start_step, refit_step, decay, inertia
        self.min_share, self.min_log_eps, self.natural = min_share, min_log_eps, prior
        self.samples = 0.0
        self.steps = 0
        self.stride = 1  # steps from one point to the next
        self.fitted_at: int | None = None
        self.fitted_points = 0
        if mixture_manager is not None:
            self.prepare()

    def prepare(self) -> None:
        manager = self.mixture_manager
        self.laws: list[ScalingLaw | None] = [None] * manager.k
        self.points = np.zeros((0, 1 + manager.k))  # samples so far, and each domain's loss then
        self.prior = manager.from_samples(manager.sizes) if self.natural == "size" else proportions(manager.initial_proportions, manager.k)
        self.state = AdoState.start(self.prior)

    def mix(self, model: Any, step_id: int, **kwargs: Any) -> np.ndarray:
        losses: DomainLosses = kwargs["losses"]
        self._remember(losses)
        # Early laws rest on few points, so fits come at doubling numbers of points until `refit_step` is the shorter interval.
        if self.fitted_at is None or step_id - self.fitted_at >= self.refit_step or len(self.points) >= 2 * self.fitted_points:
            self._fit(step_id)
        drawn = losses.tokens if self.mixture_manager.mixture_unit == "token" else losses.samples
        settings = {"decay": self.decay, "inertia": self.inertia, "min_share": self.min_share}
        self.state = ado_step(self.state, self.laws, self.samples, drawn, self.prior, **settings)
        return self.state.policy if any(self.laws) else self.mixture_manager.proportions

    def _remember(self, losses: DomainLosses) -> None:
        """Add a point for every step after `start_step`; a domain that did not occur keeps its last loss."""
        last = self.points[-1, 1:] if len(self.points) else np.full(self.mixture_manager.k, np.nan)
        new = []
        for sums, tokens, samples in zip(losses.token_loss_sums, losses.tokens, losses.samples, strict=True):
            self.samples += float(samples.sum())
            self.steps += 1
            last = np.where(tokens > 0, sums / np.maximum(tokens, 1), last)
            if self.steps > self.start_step and self.steps % self.stride == 0:
                new.append([self.samples, *last])
        if new:
            self.points = np.concatenate([self.points, np.array(new)])
        if len(self.points) > _MAX_POINTS:
            self.points, self.stride, self.fitted_points = self.points[1::2], 2 * self.stride, self.fitted_points // 2

    def _fit(self, step_id: int) -> None:
        if len(self.points) < 4:
            return
        self.fitted_at, self.fitted_points = step_id, len(self.points)
        for domain in range(self.mixture_manager.k):
            fit = fit_scaling_law(self.points[:, 0], self.points[:, 1 + domain], min_log_eps=self.min_log_eps)
            self.laws[domain] = fit or self.laws[domain]  # a fit that fails leaves the last one

    def state_dict(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "steps": self.steps,
            "stride": self.stride,
            "fitted_at": self.fitted_at,
            "fitted_points": self.fitted_points,
            "laws": [None if law is None else [law.log_beta, law.log_eps, law.a] for law in self.laws],
            "ado": [self.state.steps, *(shares.tolist() for shares in self.state[1:])],
            "points": torch.from_numpy(self.points.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples, self.steps, self.stride = state["samples"], state["steps"], state["stride"]
        self.fitted_at, self.fitted_points = state["fitted_at"], state["fitted_points"]
        self.laws = [None if law is None else ScalingLaw(*law) for law in state["laws"]]
        steps, *shares = state["ado"]
        self.state = AdoState(steps, *map(np.array, shares))
        self.points = state["points"].numpy().copy()
