"""A mixer to start your own from: proportions rise with the loss of the domains."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from annotated_types import Ge

from dataflex.core.registry import register_mixer
from dataflex.train.mixer.base_mixer import DomainLosses, Mixer


@register_mixer("custom")
class CustomMixer(Mixer):
    """An example to start your own from: proportions are the domains' losses to a power."""

    def __init__(self, mixture_manager: Any = None, *, power: Annotated[float, Ge(0)] = 1.0, **kwargs: Any):
        """
        Args:
            power: 0: equal proportions; larger: more of the domains with a high loss.
        """
        super().__init__(mixture_manager, **kwargs)
        self.power = power

    def mix(self, model: Any, step_id: int, **kwargs: Any) -> np.ndarray:
        losses: DomainLosses = kwargs["losses"]
        tokens = losses.tokens.sum(0)
        mean = losses.token_loss_sums.sum(0) / np.maximum(tokens, 1)
        return np.where(tokens > 0, mean**self.power, self.mixture_manager.proportions)
