"""The interface of ``deepspeed.ops.sparse_attention`` as of 0.19.6, on this package's kernels."""

from spion_ds.ops.sparse_attention.bert_sparse_self_attention import BertSparseSelfAttention
from spion_ds.ops.sparse_attention.sparse_attention_utils import SparseAttentionUtils
from spion_ds.ops.sparse_attention.sparse_self_attention import SparseSelfAttention
from spion_ds.ops.sparse_attention.sparsity_config import (
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    SparsityConfig,
    VariableSparsityConfig,
)

__all__ = [
    "BSLongformerSparsityConfig",
    "BertSparseSelfAttention",
    "BigBirdSparsityConfig",
    "DenseSparsityConfig",
    "FixedSparsityConfig",
    "LocalSlidingWindowSparsityConfig",
    "SparseAttentionUtils",
    "SparseSelfAttention",
    "SparsityConfig",
    "VariableSparsityConfig",
]
