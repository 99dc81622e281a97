"""Online data mixing: domains with a high loss are drawn more often, as a bandit would (ODM).

R_j <- a R_j + (1 - a) loss_j / pi_j for every domain seen since the last decision, pi = (1 - k e_t) softmax(e_{t-1} R) + e_t with
e_t = min(1/k, sqrt(ln k / (k t))); t counts decisions.
Paper: Albalak et al., "Efficient Online Data Mixing For Language Model Pre-Training", arXiv 2312.02406. There a decision follows every step.
Cost: none; losses come from the training forward.
When it fails: a domain whose loss is high because it cannot be learned is drawn as often as one that can.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Lt

from dataflex.core.registry import register_mixer
from dataflex.functional.mixing import OdmVariant, odm_policy, odm_rewards
from dataflex.train.mixer.base_mixer import DomainLosses, Mixer


@register_mixer("odm")
class OdmMixer(Mixer):
    """Domains with a high loss more often, as a bandit would (ODM, arXiv 2312.02406)."""

    def __init__(self, mixture_manager: Any = None, *, variant: OdmVariant = "paper", decay: Annotated[float, Ge(0), Lt(1)] = 0.9, **kwargs: Any):
        """
        Args:
            variant: `paper`; `code_linear` as the authors' training code (perplexity, linear); `exp3` (rewards add up).
            decay: weight a of earlier rewards.
        """
        super().__init__(mixture_manager, **kwargs)
        self.variant, self.decay = variant, decay
        self.rewards: np.ndarray | None = None
        self.updates = 0

    def mix(self, model: Any, step_id: int, **kwargs: Any) -> np.ndarray:
        losses: DomainLosses = kwargs["losses"]
        k = self.mixture_manager.k
        rewards = np.zeros(k) if self.rewards is None else self.rewards
        seen, counts = losses.sample_loss_sums.sum(0), losses.samples.sum(0)
        self.rewards = odm_rewards(rewards, seen, counts, self.mixture_manager.sample_proportions, self.variant, self.decay)
        self.updates += 1
        return odm_policy(self.rewards, self.updates, self.variant)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "rewards": None if self.rewards is None else self.rewards.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self.rewards = None if state["rewards"] is None else np.array(state["rewards"])
