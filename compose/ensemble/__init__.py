"""Ensembles: whole sparse experts side by side, their next-token distributions mixed.

Importing this registers the classes, so that `AutoModelForCausalLM` opens an ensemble.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from moiety.compose.ensemble.cache import EnsembleCache
from moiety.compose.ensemble.config import EnsembleConfig
from moiety.compose.ensemble.model import EnsembleForCausalLM, EnsembleOutput

AutoConfig.register(EnsembleConfig.model_type, EnsembleConfig, exist_ok=True)
AutoModelForCausalLM.register(EnsembleConfig, EnsembleForCausalLM, exist_ok=True)

__all__ = ["EnsembleCache", "EnsembleConfig", "EnsembleForCausalLM", "EnsembleOutput"]
