"""Models to put connections in: one decoder-only transformer and its named configurations."""

from .configs import CONFIGS, MLAConfig, ModelConfig, MoEConfig, model_config
from .decoder import RESIDUALS, Decoder, count_active_parameters, count_parameters

__all__ = [
    "Decoder", "RESIDUALS", "ModelConfig", "MoEConfig", "MLAConfig", "CONFIGS", "model_config",
    "count_parameters", "count_active_parameters",
]  # fmt: skip
