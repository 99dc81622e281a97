"""Selectors. Importing a module registers its class; add yours at the end."""

from .base_selector import ScoringSelector, Selector
from .cluster_less_selector import ClusterLessSelector
from .custom_selector import CustomSelector
from .delta_loss_selector import DeltaLossSelector
from .ifd_selector import IfdSelector
from .less_selector import LessSelector
from .loss_selector import LossSelector
from .near_selector import NearSelector
from .random_selector import RandomSelector
from .rds_selector import RdsSelector
from .tsds_selector import TsdsSelector

__all__ = [
    "ClusterLessSelector",
    "CustomSelector",
    "DeltaLossSelector",
    "IfdSelector",
    "LessSelector",
    "LossSelector",
    "NearSelector",
    "RandomSelector",
    "RdsSelector",
    "ScoringSelector",
    "Selector",
    "TsdsSelector",
]
