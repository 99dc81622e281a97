"""Proportions that do not change from the end of the warm-up on: the baselines of every comparison."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt

from dataflex.core.registry import register_mixer
from dataflex.functional.mixing import static_proportions
from dataflex.train.mixer.base_mixer import Mixer
from dataflex.utils.logging import logger

Rule = Literal["initial", "uniform", "size", "unimax"]


@register_mixer("static")
class StaticMixer(Mixer):
    """Proportions that do not change: the initial ones, equal ones, by size^temperature, or UniMax (arXiv 2304.09151)."""

    def __init__(
        self,
        mixture_manager: Any = None,
        *,
        rule: Rule = "initial",
        temperature: Annotated[float, Ge(0)] = 1.0,
        max_epochs: Annotated[float, Gt(0)] = 4.0,
        **kwargs: Any,
    ):
        """
        Args:
            rule: `initial`: those of init_mixture_proportions; `uniform`; `size`: proportional to size^temperature; `unimax`: equal, but no
                row more than `max_epochs` times in the run, unless all domains together hold too few.
            temperature: 1: by size, 0: equal.
            max_epochs: of `unimax`.
        """
        super().__init__(mixture_manager, **kwargs)
        self.rule, self.temperature, self.max_epochs = rule, temperature, max_epochs

    def mix(self, model: Any, step_id: int, **kwargs: Any) -> np.ndarray:
        manager, ctx = self.mixture_manager, kwargs["ctx"]
        if self.rule == "initial":
            return manager.initial_proportions
        budget = ctx.schedule.total_steps * ctx.samples_per_step
        most = float(manager.sizes.sum() * self.max_epochs)
        if self.rule == "unimax" and budget > most and kwargs["current_update_times"] == 1:
            logger.warning("the run takes %d samples, and max_epochs: %g allows %d: rows come up more often than that", budget, self.max_epochs, most)
        shares = static_proportions(manager.sizes, self.rule, temperature=self.temperature, budget=budget, max_epochs=self.max_epochs)
        return shares if self.rule == "uniform" else manager.from_samples(shares)
