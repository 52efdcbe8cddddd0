"""Computing attention with a block layout, and watching where dense attention goes."""

from spion_ds.attention.functional import block_sparse_attention, prepare_layout
from spion_ds.attention.layout import BlockLayout
from spion_ds.attention.learned_pattern import LearnedPattern
from spion_ds.attention.map_accumulators import AttentionMapAccumulator, PooledMapAccumulator
from spion_ds.attention.maps import attention_map, attention_skewness
from spion_ds.attention.modules import SparseSelfAttention

__all__ = [
    "AttentionMapAccumulator",
    "BlockLayout",
    "LearnedPattern",
    "PooledMapAccumulator",
    "SparseSelfAttention",
    "attention_map",
    "attention_skewness",
    "block_sparse_attention",
    "prepare_layout",
]
