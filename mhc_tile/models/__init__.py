"""Models to put connections in: one decoder-only transformer and its named configurations."""

from mhc_tile.models.configs import CONFIGS, ModelConfig, model_config
from mhc_tile.models.decoder import RESIDUALS, Decoder, count_parameters

__all__ = ["Decoder", "RESIDUALS", "ModelConfig", "CONFIGS", "model_config", "count_parameters"]
