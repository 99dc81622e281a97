"""DataFlex: optimise the data while the model trains. Names below are imported on first use, so `import dataflex` stays fast."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataflex.configs.schema import DataflexConfig
    from dataflex.core.registry import register_mixer, register_reorder, register_selector, register_weighter
    from dataflex.train.mixer.base_mixer import Mixer
    from dataflex.train.selector.base_selector import ScoringSelector, Selector
    from dataflex.train.trainer.mix_trainer import MixTrainer
    from dataflex.train.trainer.select_trainer import SelectTrainer
    from dataflex.train.trainer.weight_trainer import WeightTrainer
    from dataflex.train.weighter.base_weighter import SampleWeighter, TokenWeighter, Weighter

__version__ = "0.1.0"

_HOME = {
    "DataflexConfig": "dataflex.configs.schema",
    "MixTrainer": "dataflex.train.trainer.mix_trainer",
    "Mixer": "dataflex.train.mixer.base_mixer",
    "ScoringSelector": "dataflex.train.selector.base_selector",
    "SelectTrainer": "dataflex.train.trainer.select_trainer",
    "Selector": "dataflex.train.selector.base_selector",
    "SampleWeighter": "dataflex.train.weighter.base_weighter",
    "TokenWeighter": "dataflex.train.weighter.base_weighter",
    "WeightTrainer": "dataflex.train.trainer.weight_trainer",
    "Weighter": "dataflex.train.weighter.base_weighter",
    "register_mixer": "dataflex.core.registry",
    "register_reorder": "dataflex.core.registry",
    "register_selector": "dataflex.core.registry",
    "register_weighter": "dataflex.core.registry",
}

__all__ = ["DataflexConfig", "MixTrainer", "Mixer", "SampleWeighter", "ScoringSelector", "SelectTrainer", "Selector", "TokenWeighter"]
__all__ += ["WeightTrainer", "Weighter", "__version__"]
__all__ += ["register_mixer", "register_reorder", "register_selector", "register_weighter"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dataflex' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
