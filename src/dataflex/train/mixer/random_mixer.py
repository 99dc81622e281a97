"""Random proportions: a baseline for methods that choose them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Gt

from dataflex.core.registry import register_mixer
from dataflex.functional.mixing import random_proportions
from dataflex.train.mixer.base_mixer import Mixer


@register_mixer("random")
class RandomMixer(Mixer):
    """Proportions drawn from a Dirichlet distribution, at every decision or once."""

    def __init__(
        self,
        mixture_manager: Any = None,
        *,
        concentration: Annotated[float, Gt(0)] = 1.0,
        mode: Literal["every_update", "once"] = "every_update",
        **kwargs: Any,
    ):
        """
        Args:
            concentration: 1: all mixtures are equally likely; larger: nearer to equal proportions.
            mode: draw at every decision, or only at the first.
        """
        super().__init__(mixture_manager, **kwargs)
        self.concentration, self.mode = concentration, mode

    def mix(self, model: Any, step_id: int, **kwargs: Any) -> np.ndarray:
        return random_proportions(self.mixture_manager.k, self.concentration, self.seed, step_id if self.mode == "every_update" else 0)
