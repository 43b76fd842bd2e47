"""Configurations of decoders that are small enough for every test."""

from mhc_tile.models import MLAConfig, ModelConfig, MoEConfig

TINY = ModelConfig(
    vocab_size=256,
    hidden_size=24,
    num_layers=2,
    num_heads=3,
    head_size=8,
    ffn_size=40,
    context_length=32,
)
EXPERTS = TINY.replace(
    moe=MoEConfig(num_experts=4, expert_ffn_size=16, experts_per_token=2),
    mla=MLAConfig(kv_rank=16, rope_size=4),
)
