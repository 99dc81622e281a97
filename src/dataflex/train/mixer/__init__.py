"""Mixers. Importing a module registers its class; add yours at the end."""

from .ado_mixer import AdoMixer
from .base_mixer import Mixer
from .custom_mixer import CustomMixer
from .doremi_mixer import DoremiMixer
from .odm_mixer import OdmMixer
from .random_mixer import RandomMixer
from .static_mixer import StaticMixer

__all__ = ["AdoMixer", "CustomMixer", "DoremiMixer", "Mixer", "OdmMixer", "RandomMixer", "StaticMixer"]
