"""SparseSelfAttention: attention that follows its SparsityConfig, dense or block-sparse."""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch
from torch import Tensor

from spion_ds.attention.available import HAS_TRITON
from spion_ds.attention.callbacks import ticket_for
from spion_ds.attention.dense import dense_attention
from spion_ds.attention.derived_layouts import LIMIT, DerivedLayouts, slot_name
from spion_ds.attention.functional import (
    PRUNED,
    block_sparse_attention,
    check_tensors,
    prepare_layout,
    stand_in,
)
from spion_ds.attention.layout import BlockLayout
from spion_ds.attention.mask_holder import MaskHolder
from spion_ds.attention.observing import (
    Observer,
    captures,
    check_no_graph_trees,
    check_observer,
    show,
)
from spion_ds.errors import ConfigError, unknown_name
from spion_ds.sparsity import SparsityConfig, SwitchingSparsityConfig

LONGER = ("error", "local")


class SparseSelfAttention(MaskHolder):
    """Scaled dot-product self-attention over the blocks that a SparsityConfig keeps.

    It has no parameters, and a switch changes no key of a state_dict. While the configuration keeps
    every block, PyTorch's scaled_dot_product_attention computes it, or the kernels with a layout
    that keeps all: for dropout by keys, for padding with ``causal``, and on a GPU for padding,
    which they skip and PyTorch's fast backends do not take. In both phases a row that sees no key
    gives zeros.

    **The mask in a state_dict.** With ``max_seq_length``, and a configuration whose pattern is
    found in training, the mask is a persistent uint8 buffer, ``packed_mask``. It has its final size
    from the start and only its values change: whatever carries buffers carries the mask.

    - What is loaded or copied into the buffer is noticed at the next pass, except for writes on a
      GPU that go past autograd (``.data``, collectives): call :meth:`refresh` after these.
    - A pass compiled by torch.compile needs nothing after load_state_dict or :meth:`set_mask`.
      After another write it raises a ConfigError, until :meth:`refresh`.
    - A buffer whose digest is not that of its bits, or that is another model's, is a
      CheckpointError. A pattern set in the configuration past :meth:`set_mask` is a ConfigError.
    - It costs: where somebody wrote into the buffer, as DDP does before every pass unless it has
      ``broadcast_buffers=False``, the pass reads the 64 bytes of its header, on a GPU by waiting
      for it. A compiled pass calls an operator on the host; ``mode="reduce-overhead"`` breaks its
      CUDA graphs there, or leaves them.

    Args:
        sparsity_config: its layout is asked for again whenever its ``pattern`` is replaced.
        causal: exclude keys after the query. What a pattern keeps above the diagonal is cut; one
            that is found in training counts only what may be kept.
        scale: factor of the scores; head_dim ** -0.5 if None.
        pruned: what a pruned entry is in the softmax: ``"excluded"``, absent; or ``"zero"``, a
            logit 0 in the denominator, as SPION and SAT published it.
        dropout_p: dropout on the attention probabilities, in training mode.
        zero_padded_queries: give zeros for padding, as in :func:`block_sparse_attention`.
        max_seq_length: longest input, in tokens; makes the buffer, with room for a mask of
            ceil(max_seq_length / block) blocks a side, or one a head.
        longer: what an input longer than the pattern is: ``"error"``, or ``"local"``, which goes on
            with local blocks (``SwitchingSparsityConfig.make_mask``). Shorter inputs use the upper
            left part of the pattern.
        backend: passed to :func:`block_sparse_attention`.

    Attributes:
        packed_mask: the buffer, or None.

    Raises:
        ConfigError: names the argument, its value and what is allowed.
    """

    _observer: Observer | None
    _ticket: Tensor
    _layouts: DerivedLayouts[BlockLayout | None]
    _full_layouts: DerivedLayouts[BlockLayout]
    own: ClassVar[tuple[str, ...]] = (
        *(*MaskHolder.own, "_ticket", "_observer", "_armed"),
        *("_layouts", "_full_layouts", "_prepared"),
    )

    def __init__(
        self,
        sparsity_config: SparsityConfig,
        *,
        causal: bool = False,
        scale: float | None = None,
        pruned: str = "excluded",
        dropout_p: float = 0.0,
        zero_padded_queries: bool = False,
        max_seq_length: int | None = None,
        longer: str = "error",
        backend: str = "auto",
    ) -> None:
        super().__init__(sparsity_config, max_seq_length)
        if pruned not in PRUNED:
            raise ConfigError(unknown_name("pruned mode", pruned, PRUNED))
        if longer not in LONGER:
            raise ConfigError(unknown_name("value of longer", longer, LONGER))
        self.causal, self.scale = causal, scale
        _tell_causal(sparsity_config, causal)
        if max_seq_length is not None and isinstance(sparsity_config, SwitchingSparsityConfig):
            sparsity_config.check_room(-(-max_seq_length // sparsity_config.block))
        self.pruned = pruned
        self.dropout_p = dropout_p
        self.zero_padded_queries = zero_padded_queries
        self.longer = longer
        self.backend = backend

    @property
    def observer(self) -> Observer | None:
        """None, or who is shown each pass in training mode, until it is set to None again.

        What activation checkpointing recomputes in a backward pass is not shown a second time.
        Copies and pickles of the module have no observer.
        """
        return self._observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        check_observer(observer)
        vars(self)["_observer"] = observer
        self._armed = observer is not None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "observer":  # nn.Module would make a submodule of an observer that is a module
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def layout(self, length: int, device: torch.device) -> BlockLayout | None:
        """Return the layout for ``length`` tokens on ``device``, None while it is dense.

        It is derived at the first call after a new pattern. The last sixteen are kept, and those
        that compiled and captured passes read.
        """
        if not torch.compiler.is_compiling():
            self._follow()
            return self._layouts.get(length, device, self._derive, captures(device))
        block = self.sparsity_config.block
        blocks = operator.index(-(-length // block))  # a graph is one of a number of blocks
        self._settle(blocks * block, device, False)
        if self._format is not None:
            torch.ops.spion_ds.check_packed_mask(self._ticket)
        # What settled it does not run again: a graph that finds another pattern is traced anew.
        if getattr(self.sparsity_config, "pattern", None) is not self._known.pattern:
            raise RuntimeError("the pattern changed while the pass was traced")
        if self._known.pattern is None and isinstance(
            self.sparsity_config, SwitchingSparsityConfig
        ):
            return None  # a graph that all layers share
        return getattr(self._layouts.slots, slot_name(blocks, device))

    def prepare(
        self,
        length: int,
        device: torch.device,
        query: Tensor | None = None,
        key: Tensor | None = None,
    ) -> None:
        """Derive now what passes over ``length`` tokens need, and keep it.

        A pass does that itself, but a captured one cannot, and layers that torch.compile compiles
        one by one share their graphs only if it came before. What is derived here stays in memory
        as long as the pattern, whatever lengths follow, and is derived again for the next one.

        Args:
            length: tokens.
            device: of the passes.
            query, key: tensors like those of the passes, in shape, dtype and device; they are not
                read. The Hopper kernels have lists for each batch size: without these tensors the
                first pass derives them, which torch.compile cannot trace.
        """
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._check_length(length)
        self._follow()
        layout = self._layouts.get(length, device, self._derive, pin=True)
        if layout is None and (self.dropout_p > 0.0 or self.causal or device.type == "cuda"):
            self._full_layouts.get(length, device, self._derive_full, pin=True)
        if query is not None:
            key = query if key is None else key
            name = slot_name(-(-length // self.sparsity_config.block), device)
            like = (stand_in(query), stand_in(key))
            self._prepared[name, query.dtype, query.shape, key.shape] = like
            while len(self._prepared) > LIMIT:
                del self._prepared[next(iter(self._prepared))]
            if layout is not None:
                prepare_layout(query, key, layout, backend=self.backend)

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
            query: (batch, heads, L, head_dim); heads is the configuration's ``num_heads``.
            key, value: (batch, kv_heads, L, head_dim); kv_heads divides heads.
            key_padding_mask: (batch, L) bool, True = real token.
            dropout_key: (batch,) int32 keys of the counter-based dropout; without them the draws
                come from PyTorch's generators.

        Raises:
            ConfigError: a tensor does not fit, or the input is too long; nothing was computed.
            CheckpointError: ``packed_mask`` holds no mask of this module.
        """
        query, key, value = _alike(query, key, value)
        self._check_inputs(query, key, value, key_padding_mask)
        layout, pruned = self.layout(query.shape[2], query.device), self.pruned
        if self._armed and self.training:
            if torch.compiler.is_compiling():
                torch.ops.spion_ds.show_attention(
                    query.detach(), key.detach(), key_padding_mask, self._ticket
                )
            else:
                show(self._observer, query, key, key_padding_mask, self.causal, self.scale)
        dropout_p = self.dropout_p if self.training else 0.0
        if layout is None:
            by_keys = dropout_p > 0.0 and dropout_key is not None
            padded = key_padding_mask is not None and (self.causal or self._kernels_take(query))
            if not (by_keys or padded):
                return dense_attention(
                    query,
                    key,
                    value,
                    key_padding_mask=key_padding_mask,
                    causal=self.causal,
                    scale=self.scale,
                    dropout_p=dropout_p,
                    zero_padded_queries=self.zero_padded_queries,
                )
            layout, pruned = self._full_layout(query.shape[2], query.device), "excluded"
        return block_sparse_attention(
            query,
            key,
            value,
            layout,
            key_padding_mask=key_padding_mask,
            causal=self.causal,
            scale=self.scale,
            pruned=pruned,
            dropout_p=dropout_p,
            dropout_key=dropout_key,
            zero_padded_queries=self.zero_padded_queries,
            backend=self.backend,
        )

    def show_pass(self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None) -> None:
        """Show a compiled pass to the observer; called as it runs."""
        # What it needs is there then when a mask comes.
        self._layouts.get(query.shape[2], query.device, self._derive, pin=True)
        check_no_graph_trees(query.device)
        # A compiled graph uses its memory again, and observers may keep what they are shown.
        mask = None if key_padding_mask is None else key_padding_mask.clone()
        show(self._observer, query.clone(), key.clone(), mask, self.causal, self.scale)

    def _check_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> None:
        check_tensors(query, key, value, key_padding_mask)
        if query.shape[2] != key.shape[2]:
            raise ConfigError(
                f"query has {query.shape[2]} tokens and key {key.shape[2]}; allowed: as many, this "
                "is self-attention (block_sparse_attention takes fewer queries)"
            )
        heads = self.sparsity_config.num_heads
        if query.shape[1] != heads:
            raise ConfigError(
                f"query has {query.shape[1]} heads; allowed: {heads}, the num_heads of the "
                f"attention's sparsity_config; make that with num_heads={query.shape[1]}"
            )
        self._check_length(query.shape[2])

    def _check_length(self, length: int) -> None:
        if self._format is None or self.longer != "error":
            return
        assert self.max_seq_length is not None
        if length > self.max_seq_length:
            raise ConfigError(
                f"the input has {length} tokens; allowed: up to max_seq_length="
                f'{self.max_seq_length}, or any length with longer="local"'
            )

    def _full_layout(self, length: int, device: torch.device) -> BlockLayout:
        """Return the layout that keeps all that ``causal`` allows."""
        if torch.compiler.is_compiling():
            block = self.sparsity_config.block
            blocks = operator.index(-(-length // block))
            self._settle(blocks * block, device, True)
            return getattr(self._full_layouts.slots, slot_name(blocks, device))
        return self._full_layouts.get(length, device, self._derive_full, captures(device))

    @torch.compiler.assume_constant_result
    def _settle(self, length: int, device: torch.device, full: bool) -> bool:
        """Have what a compiled pass reads, and keep it; this runs when the pass is traced."""
        self._follow()
        if full:
            self._full_layouts.get(length, device, self._derive_full, pin=True)
        else:
            self._layouts.get(length, device, self._derive, pin=True)
        return True

    @torch.inference_mode(False)  # a training step may come to read it
    def _derive(self, length: int, device: torch.device) -> BlockLayout | None:
        config = self.sparsity_config
        if isinstance(config, SwitchingSparsityConfig):
            if config.pattern is None:
                return None
            mask = config.make_mask(length, self.longer)
        else:
            mask = config.make_mask(length)
        pruned = ~mask.tril() & torch.ones_like(mask).tril() if self.causal else ~mask
        if not pruned.any():
            return None
        return self._made(mask, device)

    @torch.inference_mode(False)
    def _derive_full(self, length: int, device: torch.device) -> BlockLayout:
        n = -(-length // self.sparsity_config.block)
        return self._made(torch.ones((n, n), dtype=torch.bool), device)

    def _made(self, mask: Tensor, device: torch.device) -> BlockLayout:
        if captures(device):
            raise ConfigError(
                "a CUDA graph is being captured, and the layout for it is not derived yet; call "
                "attention.prepare(length, device) before, or make one pass that is not captured"
            )
        mask = mask.tril() if self.causal else mask
        return BlockLayout.from_mask(mask, self.sparsity_config.block).to(device)

    def _derive_again(self) -> None:
        self._layouts.replace(self._derive)
        for (name, *_), (query, key) in self._prepared.items():
            layout = getattr(self._layouts.slots, name, None)
            if layout is not None:
                prepare_layout(query, key, layout, backend=self.backend)

    def _forget(self) -> None:
        super()._forget()
        block = self.sparsity_config.block
        self._layouts, self._full_layouts = DerivedLayouts(block), DerivedLayouts(block)
        # What passes look like, for the layouts of the next patterns.
        self._prepared: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._ticket = ticket_for(self)
        self.observer = None

    def _kernels_take(self, query: Tensor) -> bool:
        """Return whether there are block-sparse kernels for a GPU tensor."""
        if not (query.is_cuda and HAS_TRITON and self.backend in ("auto", "triton")):
            return False
        from spion_ds.attention.triton import backend as triton_backend

        return triton_backend.unsupported(query, self.sparsity_config.block) is None


def _alike(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors, cast to autocast's dtype where it is on and theirs differ."""
    kind = query.device.type
    if query.dtype == key.dtype == value.dtype or not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _tell_causal(config: SparsityConfig, causal: bool) -> None:
    """Let a configuration whose pattern is found in training know which blocks may be kept."""
    if not isinstance(config, SwitchingSparsityConfig):
        return
    if config.causal and not causal:
        raise ConfigError(
            "sparsity_config has causal=True, and causal is False here; pass causal=True, or a "
            "configuration of its own to each attention"
        )
    if vars(config).setdefault("_attends_causally", causal) != causal:
        raise ConfigError(
            "sparsity_config belongs to attention that is not causal already; pass a configuration "
            "of its own to each attention"
        )
    config.causal = causal
