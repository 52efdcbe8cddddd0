"""SparseSelfAttention under the interface of DeepSpeed 0.19.6, on the fused kernels."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spion_ds.attention import BlockLayout, block_sparse_attention
from spion_ds.attention.derived_layouts import DerivedLayouts
from spion_ds.attention.observing import captures
from spion_ds.attention.options import hide_padding
from spion_ds.errors import ConfigError
from spion_ds.ops.sparse_attention.block_tensors import (
    BlockIndex,
    multiply_blocks,
    multiply_sampled,
)
from spion_ds.ops.sparse_attention.masks import (
    EXCLUDED,
    additive,
    block_softmax,
    check_mode,
    is_causal,
    only_excludes,
)
from spion_ds.sparsity import SparsityConfig

T = TypeVar("T", BlockLayout, BlockIndex)


class SparseSelfAttention(nn.Module):
    """Scaled dot-product self-attention over the blocks that a SparsityConfig keeps.

    Without rpe and with masks that only say yes or no, the fused kernels compute it. What they
    have no place for (rpe, other attention masks, biases as padding masks) goes through products
    and softmax of block-sparse tensors: slower, but still in proportion to the kept blocks.

    Args:
        sparsity_config: says which blocks are kept.
        key_padding_mask_mode: ``"add"`` adds the mask to the scores, ``"mul"`` excludes where it
            is 0.
        attn_mask_mode: the same for the attention mask.
        max_seq_length: length at which ``master_layout`` is made. Shorter inputs take its upper
            left part; longer ones have a layout made at their own length.

    Raises:
        ConfigError: (a ValueError) another mode, or ``sparsity_config`` cannot make a layout of
            ``max_seq_length``.
    """

    def __init__(
        self,
        sparsity_config: SparsityConfig,
        key_padding_mask_mode: str = "add",
        attn_mask_mode: str = "mul",
        max_seq_length: int = 2048,
    ) -> None:
        super().__init__()
        self.sparsity_config = sparsity_config
        self.key_padding_mask_mode = check_mode("key_padding_mask_mode", key_padding_mask_mode)
        self.attn_mask_mode = check_mode("attn_mask_mode", attn_mask_mode)
        self.max_seq_length = max_seq_length
        self.master_layout: Tensor
        # A pattern that is found in training is asked for at each length; here it is still dense.
        if hasattr(sparsity_config, "pattern"):
            block = sparsity_config.block
            max_seq_length = -(-max_seq_length // block) * block
            master_layout = SparsityConfig(sparsity_config.num_heads, block).setup_layout(
                max_seq_length
            )
            master_layout.fill_(1)
        else:
            with _same_draws_everywhere():
                master_layout = sparsity_config.make_layout(max_seq_length)
        self.register_buffer("master_layout", master_layout)
        self._made: dict[tuple, DerivedLayouts] = {}
        self._pattern: Tensor | None = None

    def get_layout(self, L: int) -> Tensor:
        """Return the int64 layout (num_heads, n, n) for ``L`` tokens, n = ceil(L / block)."""
        block = self.sparsity_config.block
        n = -(-L // block)
        if hasattr(self.sparsity_config, "pattern") or n > self.master_layout.shape[-1]:
            with _same_draws_everywhere():
                return self.sparsity_config.make_layout(n * block)
        return self.master_layout[..., :n, :n].cpu()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpe: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Return (batch, heads, L, head_dim); zeros in rows whose kept keys are all excluded.

        Args:
            query, value: (batch, heads, L, head_dim), in a dtype of ``block_sparse_attention``.
            key: the same, or transposed: (batch, heads, head_dim, L).
            rpe: relative position bias, added to the scaled scores: (L, L) or with leading
                (batch or 1, heads or 1); it gets a gradient.
            key_padding_mask: (batch, L), or with dimensions of size 1 between or after. Added
                values of -5000 and less exclude a key; so does False in a bool mask.
            attn_mask: (L, L) or with leading (batch or 1, heads or 1); the same holds.

        Raises:
            ConfigError: (a ValueError) shapes do not fit, or as ``block_sparse_attention``.
        """
        if key.shape != query.shape and key.transpose(-2, -1).shape == query.shape:
            key = key.transpose(-2, -1)
        if query.dim() != 4 or not query.shape == key.shape == value.shape:
            raise ConfigError(
                "query, key and value share one shape, (batch, heads, L, head_dim); only "
                f"self-attention is supported; got {tuple(query.shape)}, {tuple(key.shape)} and "
                f"{tuple(value.shape)}"
            )
        padding = self._padding(key_padding_mask, query)
        fused = rpe is None and (padding is None or padding.dtype == torch.bool)
        causal = False
        if fused and attn_mask is not None:
            causal = is_causal(attn_mask, self.attn_mask_mode)
            fused = causal
        if not fused:
            return self._in_steps(query, key, value, rpe, padding, attn_mask)
        layout = self._get(BlockLayout, query, causal)
        return block_sparse_attention(
            query,
            key,
            value,
            layout,
            key_padding_mask=padding,
            causal=causal,
            pruned="excluded",
        )

    def _padding(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """Return a (batch, L) mask, bool if it only excludes, else what is added."""
        if mask is None:
            return None
        batch, length = query.shape[0], query.shape[2]
        if mask.numel() != batch * length or mask.shape[0] != batch:
            raise ConfigError(
                f"key_padding_mask is ({batch}, {length}), or with dimensions of size 1 between "
                f"or after; got {tuple(mask.shape)}"
            )
        if mask.dtype == torch.bool:
            return mask.view(batch, length)
        mode = self.key_padding_mask_mode
        if only_excludes(mask, mode):
            flat = mask.reshape(batch, length)
            return flat != 0 if mode == "mul" else flat > EXCLUDED
        return mask.reshape(batch, length)

    def _in_steps(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpe: Tensor | None,
        padding: Tensor | None,
        attn_mask: Tensor | None,
    ) -> Tensor:
        """Compute with block-sparse scores and probabilities, (batch, kept blocks, b, b)."""
        index = self._get(BlockIndex, query, False)
        kind = query.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        length, full = query.shape[2], torch.float32
        rest = index.shape[1] * index.block - length
        if padding is not None:
            padding = self._excluding(padding, "add")
            real = padding != float("-inf")
            query, key, value = hide_padding(query, key, value, real, of_queries=True, zeroed=False)
        elif rest:
            padding = torch.zeros((query.shape[0], length), dtype=full, device=query.device)
        if padding is not None:
            padding = F.pad(padding, (0, rest), value=float("-inf"))
        if attn_mask is not None:
            attn_mask = self._excluding(attn_mask, self.attn_mask_mode)
            attn_mask = F.pad(attn_mask, (0, rest, 0, rest))
        if rpe is not None:
            rpe = F.pad(rpe.to(full), (0, rest, 0, rest))
        # Scaled first: unscaled scores can be too large for float16.
        query = query * query.shape[-1] ** -0.5
        q, k, v = (F.pad(x, (0, 0, 0, rest)) for x in (query, key, value))
        with torch.autocast(kind, enabled=False):
            probs = block_softmax(
                multiply_sampled(q, k, index),
                index,
                rpe=rpe,
                key_padding_mask=padding,
                attn_mask=attn_mask,
            )
            return multiply_blocks(probs, v, index)[:, :, :length]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._made.clear()  # they were made of another master_layout

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}

    @staticmethod
    def _excluding(mask: Tensor, mode: str) -> Tensor:
        """Return what is added, with -inf for all values that mean "not at all"."""
        added = additive(mask, mode, torch.float32)
        return added.masked_fill(added <= EXCLUDED, float("-inf"))

    @torch.compiler.disable
    def _get(self, kind: type[T], query: Tensor, causal: bool) -> T:
        """Return the layout for the query's length and device, as ``kind``.

        The last sixteen are kept, and those that a CUDA graph reads.
        """
        pattern = getattr(self.sparsity_config, "pattern", None)
        if pattern is not self._pattern:
            self._made.clear()
            self._pattern = pattern
        heads, length, device = query.shape[1], query.shape[2], query.device
        name = (kind, heads, causal)
        if name not in self._made:
            self._made[name] = DerivedLayouts(self.sparsity_config.block)

        def make(length: int, device: torch.device) -> T:
            return self._make(kind, heads, length, device, causal)

        return self._made[name].get(length, device, make, captures(device))

    def _make(
        self, kind: type[T], heads: int, length: int, device: torch.device, causal: bool
    ) -> T:
        mask = self.get_layout(length).bool()
        if mask.shape[0] not in (1, heads):
            raise ConfigError(
                f"the sparsity configuration is for {mask.shape[0]} heads and the query has "
                f"{heads}; give the configuration num_heads={heads}"
            )
        mask = mask.tril() if causal else mask
        block = self.sparsity_config.block
        if kind is BlockIndex:
            return kind.from_mask(mask.expand(heads, -1, -1), block, device)
        shared = bool((mask == mask[:1]).all())
        return BlockLayout.from_mask(mask[0] if shared else mask, block).to(device)


@contextmanager
def _same_draws_everywhere() -> Iterator[None]:
    """Let a layout class of the user's draw the same random blocks on every rank."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.default_generator.manual_seed(0)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
