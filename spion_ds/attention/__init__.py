"""Computing attention with a block layout, and watching where dense attention goes."""

from spion_ds.attention.functional import block_sparse_attention
from spion_ds.attention.layout import BlockLayout
from spion_ds.attention.maps import AttentionMapAccumulator, attention_map
from spion_ds.attention.modules import SparseSelfAttention

__all__ = [
    "AttentionMapAccumulator",
    "BlockLayout",
    "SparseSelfAttention",
    "attention_map",
    "block_sparse_attention",
]
