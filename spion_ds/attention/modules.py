"""SparseSelfAttention: attention that follows its SparsityConfig, dense or block-sparse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spion_ds.attention.available import HAS_TRITON
from spion_ds.attention.functional import block_sparse_attention, prepare_layout
from spion_ds.attention.layout import BlockLayout
from spion_ds.attention.map_accumulators import AttentionMapAccumulator, PooledMapAccumulator
from spion_ds.attention.options import zero_padding
from spion_ds.sparsity import SparsityConfig


class SparseSelfAttention(nn.Module):
    """Scaled dot-product self-attention over the blocks that a SparsityConfig keeps.

    No parameters and no persistent buffers: swapping the pattern changes no checkpoint key. While
    the configuration keeps every block, PyTorch's scaled_dot_product_attention computes it, or
    the kernels with a layout that keeps all: for dropout by keys, and on a GPU for padding, which
    they skip and PyTorch's fast backends do not take.

    Args:
        sparsity_config: its layout is asked for again whenever its ``pattern`` is replaced.
        pruned: what a pruned entry is in the softmax, ``"zero"`` or ``"excluded"``.
        dropout_p: dropout on the attention probabilities, in training mode.
        zero_padded_queries: give zeros for padding, as in :func:`block_sparse_attention`.
        backend: passed to :func:`block_sparse_attention`.
    """

    def __init__(
        self,
        sparsity_config: SparsityConfig,
        *,
        pruned: str = "zero",
        dropout_p: float = 0.0,
        zero_padded_queries: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.sparsity_config = sparsity_config
        self.pruned = pruned
        self.dropout_p = dropout_p
        self.zero_padded_queries = zero_padded_queries
        self.backend = backend
        # Set by whoever wants to see one forward pass; reset by the pass that it saw, so that a
        # pass recomputed for activation checkpointing is not seen twice.
        self.observer: AttentionMapAccumulator | PooledMapAccumulator | None = None
        self._layouts: dict[tuple[int, torch.device], BlockLayout | None] = {}
        self._pattern: Tensor | None = None
        # Layouts that keep all: the prepared ones stay, since a captured CUDA graph reads them.
        self._prepared: dict[tuple[int, torch.device], BlockLayout] = {}
        self._latest: BlockLayout | None = None

    def layout(self, length: int, device: torch.device) -> BlockLayout | None:
        """Return the layout for ``length`` tokens on ``device``, None while it is dense.

        It is derived at the first call after a new pattern.
        """
        pattern = getattr(self.sparsity_config, "pattern", None)
        if pattern is not self._pattern:
            self._layouts.clear()
            self._pattern = pattern
        if (length, device) not in self._layouts:
            self._layouts[length, device] = self._derive(length, device)
        return self._layouts[length, device]

    def prepare(
        self,
        length: int,
        device: torch.device,
        query: Tensor | None = None,
        key: Tensor | None = None,
    ) -> None:
        """Derive now what passes over ``length`` tokens need.

        A pass does that itself, but where torch.compile traces it the graph breaks there: call
        this before the first compiled pass, and again after a new pattern.

        Args:
            length: tokens.
            device: of the passes.
            query, key: tensors like those of the passes, in shape, dtype and device; they are not
                read. The Hopper kernels have lists for each batch size: without these tensors the
                first pass derives them.
        """
        layout = self.layout(length, device)
        if layout is not None:
            if query is not None:
                prepare_layout(query, query if key is None else key, layout, backend=self.backend)
        elif self.dropout_p > 0.0 or device.type == "cuda":
            layout = self._full_layout(length, device)
            self._prepared[layout.num_rows, device] = layout

    @torch.compiler.disable
    def _derive(self, length: int, device: torch.device) -> BlockLayout | None:
        config = self.sparsity_config
        mask = config.make_mask(length)
        return None if bool(mask.all()) else BlockLayout.from_mask(mask, config.block).to(device)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        dropout_key: Tensor | None = None,
    ) -> Tensor:
        """Return (batch, heads, L, head_dim).

        Args:
            query, key, value: (batch, heads, L, head_dim).
            key_padding_mask: (batch, L) bool, True = real token.
            dropout_key: (batch,) int32 keys of the counter-based dropout; without them the draws
                come from PyTorch's generators.
        """
        if self.observer is not None:
            observer, self.observer = self.observer, None
            observer.add(query, key, key_padding_mask)
        dropout_p = self.dropout_p if self.training else 0.0
        layout, pruned = self.layout(query.shape[2], query.device), self.pruned
        if layout is None:
            by_keys = dropout_p > 0.0 and dropout_key is not None
            padded = key_padding_mask is not None and self._kernels_take(query)
            if not (by_keys or padded):
                return self._dense(query, key, value, key_padding_mask, dropout_p)
            layout, pruned = self._full_layout(query.shape[2], query.device), "excluded"
        return block_sparse_attention(
            query,
            key,
            value,
            layout,
            key_padding_mask=key_padding_mask,
            pruned=pruned,
            dropout_p=dropout_p,
            dropout_key=dropout_key,
            zero_padded_queries=self.zero_padded_queries,
            backend=self.backend,
        )

    def _dense(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float
    ) -> Tensor:
        if mask is None:
            return F.scaled_dot_product_attention(query, key, value, None, dropout_p)
        out = F.scaled_dot_product_attention(query, key, value, mask[:, None, None, :], dropout_p)
        return zero_padding(out, mask) if self.zero_padded_queries else out

    def _full_layout(self, length: int, device: torch.device) -> BlockLayout:
        n = -(-length // self.sparsity_config.block)
        if (n, device) in self._prepared:
            return self._prepared[n, device]
        if self._latest is None or self._latest.num_rows != n or self._latest.device != device:
            ones = torch.ones((n, n), dtype=torch.bool, device=device)
            self._latest = BlockLayout.from_mask(ones, self.sparsity_config.block)
        return self._latest

    def _kernels_take(self, query: Tensor) -> bool:
        """Return whether there are block-sparse kernels for a GPU tensor."""
        if not (query.is_cuda and HAS_TRITON and self.backend in ("auto", "triton")):
            return False
        from spion_ds.attention.triton import backend as triton_backend

        return triton_backend.unsupported(query, self.sparsity_config.block) is None
