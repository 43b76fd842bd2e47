"""Models to put connections in: one decoder-only transformer and its named configurations."""

from .configs import CONFIGS, ModelConfig, model_config
from .decoder import RESIDUALS, Decoder, count_parameters

__all__ = ["Decoder", "RESIDUALS", "ModelConfig", "CONFIGS", "model_config", "count_parameters"]
