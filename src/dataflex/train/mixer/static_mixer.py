"""Proportions that do not change: the baselines of every comparison."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt

from dataflex.core.registry import register_mixer
from dataflex.functional.mixing import static_proportions
from dataflex.train.mixer.base_mixer import Mixer

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
                row more than `max_epochs` times in the run.
            temperature: 1: by size, 0: equal.
            max_epochs: of `unimax`.
        """
        super().__init__(mixture_manager, **kwargs)
        self.rule, self.temperature, self.max_epochs = rule, temperature, max_epochs

    def begin(self, ctx: Any) -> None:
        if self.rule == "initial":
            return
        budget = ctx.schedule.total_steps * ctx.samples_per_step
        settings = {"temperature": self.temperature, "budget": budget, "max_epochs": self.max_epochs}
        shares = static_proportions(self.mixture_manager.sizes, self.rule, **settings)
        self.mixture_manager.set_proportions(shares if self.rule == "uniform" else self.mixture_manager.from_samples(shares))

    def mix(self, model: Any, step_id: int, **kwargs: Any) -> np.ndarray:
        return self.mixture_manager.proportions
