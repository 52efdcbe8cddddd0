"""Showing an attention pass to an observer: each pass once, and without a trace in its results."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from spion_ds.errors import ConfigError


class Observer(Protocol):
    """Who looks at the queries and keys of a layer, such as a PooledMapAccumulator."""

    def add(
        self,
        q: Tensor,
        k: Tensor,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> None:
        """Look at one micro-batch.

        It is called without gradients, and may keep the tensors but not write to them.

        Args:
            q: (batch, heads, L, head_dim).
            k: (batch, kv_heads, L, head_dim), kv_heads divides heads.
            key_padding_mask: (batch, L) bool, True = real token; None where all are.
            causal: whether keys after the query are excluded.
            scale: factor of the scores; head_dim ** -0.5 if None.
        """
        ...


def check_observer(observer: object) -> None:
    """Raise ConfigError unless ``observer`` is None or has a method ``add``."""
    if observer is not None and not callable(getattr(observer, "add", None)):
        raise ConfigError(
            f"observer is a {type(observer).__name__}; allowed: None, or an object with a method "
            "add(q, k, key_padding_mask=None, causal=False, scale=None)"
        )


def show(
    observer: Observer | None,
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> None:
    """Show a pass to its observer, unless activation checkpointing recomputes it.

    Raises:
        ConfigError: a CUDA graph is being captured: its replays would show nothing.
    """
    # A recomputation runs inside a backward pass, whoever asks for it: both kinds of PyTorch's
    # checkpointing and DeepSpeed's.
    if observer is None or recomputes() or query.is_meta:
        return
    if captures(query.device):
        raise ConfigError(
            "an attention with an observer is captured in a CUDA graph, whose replays would show "
            "it nothing; set attention.observer = None before a capture, and run observed steps "
            "without the graph"
        )
    # A sum that is made here must take in-place additions under any autograd mode later.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(query.device.type, enabled=False),
    ):
        observer.add(
            query.detach(),
            key.detach(),
            key_padding_mask=key_padding_mask,
            causal=causal,
            scale=scale,
        )


def recomputes() -> bool:
    """Return whether this thread is inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


def captures(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured on this thread's stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_no_graph_trees(device: torch.device) -> None:
    """Raise ConfigError if TorchInductor keeps CUDA graphs of compiled passes on this device.

    A pass that is shown from the middle of such a graph loses what its backward pass needs.
    """
    if device.type != "cuda":
        return
    try:
        from torch._inductor.cudagraph_trees import get_manager
    except ImportError:
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    if get_manager(index, create_if_none_exists=False) is not None:
        raise ConfigError(
            'an attention with an observer is compiled with mode="reduce-overhead", whose CUDA '
            "graphs cannot be looked into; compile it in the default mode, or show its queries and "
            "keys by hand (DenseToSparse: look.by_hand())"
        )
