"""Which blocks are kept, in DeepSpeed's terms."""

from spion_ds.sparsity.bigbird import BigBirdSparsityConfig
from spion_ds.sparsity.block import (
    AttentionConfig,
    SparseAttentionConfig,
    read_sparse_attention,
    take_sparse_attention_block,
)
from spion_ds.sparsity.budget import BudgetSparsityConfig
from spion_ds.sparsity.config import DenseSparsityConfig, SparsityConfig
from spion_ds.sparsity.fixed import FixedSparsityConfig
from spion_ds.sparsity.local import LocalSlidingWindowSparsityConfig
from spion_ds.sparsity.longformer import BSLongformerSparsityConfig
from spion_ds.sparsity.modes import SatAttentionConfig
from spion_ds.sparsity.sat import SatSparsityConfig
from spion_ds.sparsity.spion import SpionSparsityConfig
from spion_ds.sparsity.switching import SwitchingSparsityConfig, find_patterns
from spion_ds.sparsity.variable import VariableSparsityConfig

__all__ = [
    "AttentionConfig",
    "BSLongformerSparsityConfig",
    "BigBirdSparsityConfig",
    "BudgetSparsityConfig",
    "DenseSparsityConfig",
    "FixedSparsityConfig",
    "LocalSlidingWindowSparsityConfig",
    "SatAttentionConfig",
    "SatSparsityConfig",
    "SparseAttentionConfig",
    "SparsityConfig",
    "SpionSparsityConfig",
    "SwitchingSparsityConfig",
    "VariableSparsityConfig",
    "find_patterns",
    "read_sparse_attention",
    "take_sparse_attention_block",
]
