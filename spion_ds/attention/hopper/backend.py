"""Block-sparse attention on Hopper GPUs: CUDA kernels for wgmma and the bulk copy engine.

They compute what triton_backend.py computes, for bf16 and fp16, head_dim 64 and 128, and blocks of
64 and 128 tokens, without causal masking and dropout. csrc/hopper/ holds them;
docs/kernels_hopper.md says how they work and what was measured. Under torch.compile the operators
``spion_ds::hopper_attention_{fwd,bwd}`` stand in the graph with their gradients; in eager mode a
Function of their own calls them, which costs the host less.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from spion_ds import compiling
from spion_ds.attention.derivatives import derivative_by, refuse_second_derivative
from spion_ds.attention.hopper.plan import TOKENS, Problem, WorkLists, work_lists
from spion_ds.attention.layout import BlockLayout
from spion_ds.attention.options import AttentionOptions
from spion_ds.attention.query_rows import in_whole_blocks
from spion_ds.errors import ConfigError

_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_DIMS = (64, 128)
_BLOCKS = (64, 128)
# From how many queries on they are faster at head_dim 64.
_LONG = 4096


def block_sparse_attention_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    options: AttentionOptions,
) -> Tensor:
    """Return (B, H, L, D) in q's dtype; arguments as in ``block_sparse_attention``.

    Scores and sums are float32; probabilities are rounded to q's dtype where they are multiplied.

    Raises:
        ConfigError: no kernel for these arguments or this device.
    """
    reason = unsupported(q, layout, options)
    if reason is not None:
        raise ConfigError(reason)
    load()
    queries, before = q.shape[2], options.query_offset % layout.block
    q = in_whole_blocks(q, options.query_offset, layout.block)
    padding = options.key_padding_mask
    arguments = (
        *(q, k, v, *work_lists(layout, Problem.of(q, k)), padding),
        *(layout.heads > 1, options.scale, options.pruned == "zero"),
        options.zero_padded_queries and padding is not None,
    )
    if torch.compiler.is_compiling():
        out = _fwd_op(*arguments)[0]
    else:
        out = _BlockSparseAttention.apply(*arguments)
    out = out[:, :, before : before + queries] if before else out
    return options.zeroed(out)  # its gradient too


def unsupported(q: Tensor, layout: BlockLayout, options: AttentionOptions) -> str | None:
    """Return why there is no kernel for such a call, None if there is."""
    if q.dtype not in _DTYPES or q.shape[3] not in _HEAD_DIMS:
        return (
            f"the hopper backend takes bf16 and fp16 with head_dim 64 and 128; got {q.dtype} with "
            f"head_dim {q.shape[3]}"
        )
    if layout.block not in _BLOCKS:
        return f"the hopper backend has kernels for blocks of {_BLOCKS}; got {layout.block}"
    if options.causal or options.dropout_p > 0.0:
        return "the hopper backend has no causal masking and no dropout"
    if options.scale <= 0.0:
        return f"the hopper backend takes a scale above 0; got {options.scale}"
    if not is_hopper(q.device):
        return f"the hopper backend runs on GPUs of compute capability 9.0; q is on {q.device}"
    return None


def is_faster(q: Tensor, options: AttentionOptions) -> bool:
    """Return whether ``backend="auto"`` prefers these kernels to Triton's where both serve.

    The rule: no padding mask, no query offset, and head_dim 128, or head_dim 64 and at least 4096
    queries.
    """
    # Triton's kernels leave padding out, these compute it, and how much there is only the GPU
    # knows. And every other offset has other rows, with work lists of their own.
    if options.key_padding_mask is not None or options.query_offset:
        return False
    # Forward + backward on an H100 over dense cuDNN, theirs : Triton's, at densities .25, .10, .05
    # (benchmarks/results, 2026-11-26-h100.md : 2026-11-24-h100.md; at 4096 both of the former):
    #   2,8,16384,128, block 64    .339 : .386    .153 : .172    .086 : .098
    #   2,8,16384,128, block 128   .320 : .381    .140 : .179    .081 : .096
    #   2,8,16384,64,  block 64    .322 : .329    .137 : .142    .075 : .080
    #   2,8,16384,64,  block 128   .304 : .334    .127 : .145    .070 : .082
    #   8,8,4096,64,   block 64    .322 : .347    .174 : .184    .132 : .127
    #   8,8,4096,64,   block 128   .311 : .357    .173 : .186    .129 : .130
    return q.shape[3] == 128 or q.shape[2] >= _LONG


def serves_auto(q: Tensor, layout: BlockLayout, options: AttentionOptions) -> bool:
    """Return whether ``backend="auto"`` takes these kernels; it never compiles them."""
    return unsupported(q, layout, options) is None and is_faster(q, options) and is_built()


def prepare(q: Tensor, k: Tensor, layout: BlockLayout, backend: str, query_offset: int = 0) -> None:
    """Derive the work lists of passes over ``q`` and ``k``, if these kernels can serve them.

    ``layout`` has the rows of the queries, of which the first stands at ``query_offset``.
    """
    scale = q.shape[3] ** -0.5
    options = AttentionOptions(None, False, scale, "zero", 0.0, None, False, query_offset)
    if backend == "auto" and not serves_auto(q, layout, options):
        return
    if unsupported(q, layout, options) is None:
        q = in_whole_blocks(q, query_offset, layout.block)
        work_lists(layout, Problem.of(q, k))


@torch.compiler.assume_constant_result  # tracing cannot ask the driver
def is_hopper(device: torch.device) -> bool:
    """Return whether a device has compute capability 9.0."""
    return device.type == "cuda" and _capability(device) == (9, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result  # tracing cannot load libraries
def load() -> bool:
    """Load the kernels on the first call, compiling them if need be; return True.

    Raises:
        ConfigError: the compiler is missing or fails.
    """
    return _load()


@torch.compiler.assume_constant_result
def is_built() -> bool:
    """Return whether the kernels were compiled before, and load them; asked once a process."""
    return _is_built()


@functools.cache
def _load() -> bool:
    try:
        compiling.HOPPER.load(torch.ops.load_library)
    except (RuntimeError, OSError, ImportError) as error:
        why = compiling.reason(error).splitlines()[0]
        raise ConfigError(
            f"the hopper backend could not be compiled or loaded ({why}); it needs nvcc 12.3 or "
            'newer, a C++ compiler and ninja; backend="triton" needs none'
        ) from error
    _is_built.cache_clear()
    return True


@functools.cache
def _is_built() -> bool:
    try:
        compiling.HOPPER.load(torch.ops.load_library, compile=False)
    except (RuntimeError, OSError):
        return False
    return True


_LISTS = ", ".join(f"Tensor {name}" for name in WorkLists._fields)
_REST = "Tensor? padding, bool per_head, float scale, bool pruned_zero, bool skip_padded"
_SETTINGS = 4  # of these, past the tensors
# Inductor hands over the strides of eager mode, which the fakes below count on.
_STRIDES = torch.Tag.needs_exact_strides
# csrc/hopper/binding.cpp implements both.
_library = torch.library.Library("spion_ds", "FRAGMENT")
_library.define(
    f"hopper_attention_fwd(Tensor q, Tensor k, Tensor v, {_LISTS}, {_REST})"
    " -> (Tensor out, Tensor lse)",
    tags=_STRIDES,
)
_library.define(
    "hopper_attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_LISTS}, {_REST}) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=_STRIDES,
)
_fwd_op = torch.ops.spion_ds.hopper_attention_fwd.default
_bwd_op = torch.ops.spion_ds.hopper_attention_bwd.default


def _fwd_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    padded = -(-q.shape[2] // TOKENS) * TOKENS
    return _like(q), q.new_empty((*q.shape[:2], padded), dtype=torch.float32)


def _bwd_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _like(q), _like(k), _like(v)


def _like(x: Tensor) -> Tensor:
    """Return memory for what has the shape of ``x``, where the copy engine can follow it."""
    strides = zip(x.shape[:3], x.stride()[:3], strict=True)
    copyable = x.stride(3) == 1 and all(n <= 1 or (s > 0 and s % 8 == 0) for n, s in strides)
    return torch.empty_like(x) if copyable else x.new_empty(x.shape)


_setup_context, _backward = derivative_by(_bwd_op, _SETTINGS)


class _BlockSparseAttention(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        output = _fwd_op(*arguments)
        _setup_context(ctx, arguments, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The operator refuses to be differentiated again.
        return _backward(ctx, grad)


torch.library.register_fake("spion_ds::hopper_attention_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("spion_ds::hopper_attention_bwd", _bwd_fake, lib=_library)
torch.library.register_autograd(
    "spion_ds::hopper_attention_fwd", _backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd(
    "spion_ds::hopper_attention_bwd", refuse_second_derivative, lib=_library
)
