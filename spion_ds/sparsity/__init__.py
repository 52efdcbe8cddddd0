"""Which blocks are kept, in DeepSpeed's terms."""

from spion_ds.sparsity.block import SparseAttentionConfig, take_sparse_attention_block
from spion_ds.sparsity.config import DenseSparsityConfig, SparsityConfig
from spion_ds.sparsity.spion import SpionSparsityConfig

__all__ = [
    "DenseSparsityConfig",
    "SparseAttentionConfig",
    "SparsityConfig",
    "SpionSparsityConfig",
    "take_sparse_attention_block",
]
