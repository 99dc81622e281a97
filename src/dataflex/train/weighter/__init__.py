"""Weighters. Importing a module registers its class; add yours at the end."""

from .adapt_weighter import AdaptWeighter
from .base_weighter import PopulationWeighter, SampleWeighter, TokenWeighter, Weighter
from .custom_weighter import CustomWeighter
from .joint_update_aware_weighter import JointUpdateAwareWeighter
from .loss_weighter import LossWeighter
from .token_gate_weighter import DftWeighter, FocalWeighter

__all__ = [
    "AdaptWeighter",
    "CustomWeighter",
    "DftWeighter",
    "FocalWeighter",
    "JointUpdateAwareWeighter",
    "LossWeighter",
    "PopulationWeighter",
    "SampleWeighter",
    "TokenWeighter",
    "Weighter",
]
