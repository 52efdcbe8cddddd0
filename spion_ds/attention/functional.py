"""block_sparse_attention: one function, several backends, one contract."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from spion_ds.attention.available import HAS_TRITON
from spion_ds.attention.derivatives import refuse_transforms
from spion_ds.attention.layout import BlockLayout
from spion_ds.attention.options import AttentionOptions, hide_padding
from spion_ds.attention.query_rows import rows_of_queries
from spion_ds.attention.reference import block_sparse_attention_reference
from spion_ds.attention.torch_backend import block_sparse_attention_torch
from spion_ds.errors import ConfigError, unknown_name

BACKENDS = ("auto", "reference", "torch", "triton", "hopper", "cpp")
PRUNED = ("zero", "excluded")


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    pruned: str = "zero",
    dropout_p: float = 0.0,
    dropout_key: Tensor | None = None,
    zero_padded_queries: bool = False,
    query_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Return attention restricted to the layout's blocks, (batch, heads, L, head_dim).

    In float32 the relative error of gradients grows by up to 2^-23 times the largest score, and in
    float16 the gradient of a score must stay below 65504 (docs/attention.md, "How exact").

    Args:
        q: (batch, heads, L, head_dim), bf16, fp16, fp32 or fp64, contiguous or strided. Under
            autocast q, k and v are cast to its dtype first, as in scaled_dot_product_attention.
        k, v: (batch, kv_heads, M, head_dim) in q's dtype; kv_heads divides heads.
        layout: kept blocks, for all heads or one layout a head: ceil(M / block) columns and at
            least ceil((query_offset + L) / block) rows. A query row that keeps nothing gives
            zeros and zero gradients.
        key_padding_mask: (batch, M) bool, True = real token. Padded keys are never attended to,
            and whatever they hold, NaN included, reaches nothing.
        causal: mask entries above the diagonal inside kept blocks. Blocks wholly above the
            diagonal are an error in the layout.
        scale: factor of the scores; head_dim ** -0.5 if None.
        pruned: ``"zero"``: a pruned valid key counts as logit 0 in the softmax's denominator and
            adds nothing to the output (SPION). ``"excluded"``: it is absent (DeepSpeed).
        dropout_p: probability of dropping a kept probability.
        dropout_key: (batch,) int32 keys of the counter-based generator (attention/dropout.py);
            drawn from PyTorch's default generator if None.
        zero_padded_queries: in self-attention, give zeros for the queries that
            ``key_padding_mask`` calls padding, and no gradients. Where nobody reads them this
            saves their work.
        query_offset: the position of the first query, for decoding with a cache of keys and for
            long inputs in chunks: query i stands at position query_offset + i, reads that
            position's block row of the layout, and under ``causal`` sees the keys up to it.
            Not with dropout and not with zero_padded_queries.
        backend: ``"reference"`` is the specification, the others cost in proportion to the kept
            blocks. ``"auto"`` takes triton on a GPU, cpp on a CPU, and torch where those cannot
            serve; on a GPU of compute capability 9.0 hopper instead, where its kernels serve, are
            built (``python -m spion_ds.report`` says whether) and were measured to be faster
            (``hopper_backend.is_faster``).

    Raises:
        ConfigError: (a ValueError) shapes, dtypes, devices or the layout do not fit; the message
            names what and what is allowed.
        NotImplementedError: a derivative is asked for that only the reference has: in forward
            mode, by torch.func, or of a gradient.
    """
    check_tensors(q, k, v, key_padding_mask)
    _check_query_offset(query_offset, dropout_p, zero_padded_queries)
    _check_layout(layout, q, k, query_offset)
    rows = rows_of_queries(layout, q.shape[2], query_offset)
    if causal and rows.above_diagonal:
        raise ConfigError(
            "causal=True, but the layout keeps blocks wholly above the diagonal; remove them with "
            "mask.tril() before BlockLayout.from_mask"
        )
    zero_padded_queries = zero_padded_queries and key_padding_mask is not None
    if zero_padded_queries and q.shape[2] != k.shape[2]:
        raise ConfigError(
            "zero_padded_queries=True is for self-attention, where key_padding_mask is of the "
            f"queries too; got {q.shape[2]} queries and {k.shape[2]} keys"
        )
    if pruned not in PRUNED:
        raise ConfigError(unknown_name("pruned mode", pruned, PRUNED))
    if backend not in BACKENDS:
        raise ConfigError(unknown_name("attention backend", backend, BACKENDS))
    if backend != "reference":
        refuse_transforms('block-sparse attention (but for backend="reference")', q, k, v)
    if not 0.0 <= dropout_p < 1.0:
        raise ConfigError(f"dropout_p is {dropout_p}; allowed: 0 up to, not including, 1")
    if dropout_p > 0.0:
        dropout_key = _check_dropout_key(dropout_key, q)
    autocast = torch.is_autocast_enabled(q.device.type)
    if autocast:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    # A backend chooses the precision of its products itself.
    with torch.autocast(q.device.type, enabled=False) if autocast else nullcontext():
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        options = AttentionOptions(
            *(key_padding_mask, causal, scale, pruned, dropout_p, dropout_key),
            *(zero_padded_queries, query_offset),
        )
        if backend == "auto":
            backend = choose_backend(q, layout, options)
        given = layout if backend == "reference" else rows
        if key_padding_mask is not None and backend != "triton":  # whose kernels hide it
            q, k, v = hide_padding(
                *(q, k, v, key_padding_mask),
                of_queries=query_offset == 0 and q.shape[2] == k.shape[2],
                zeroed=zero_padded_queries,
            )
        return _implementation(backend)(q, k, v, given, options)


def prepare_layout(
    q: Tensor,
    k: Tensor,
    layout: BlockLayout,
    *,
    query_offset: int | None = None,
    backend: str = "auto",
) -> None:
    """Derive now what passes over tensors like ``q`` and ``k`` need of a layout on the host.

    Such a pass does that itself, once a layout and shape. But torch.compile cannot trace it and a
    CUDA graph cannot capture it: call this before, or make one pass that is neither.

    Args:
        q: (batch, heads, L, head_dim) as in :func:`block_sparse_attention`, on the same device and
            in the dtype that attention gets; its values are not read.
        k: (batch, kv_heads, M, head_dim).
        layout: as in :func:`block_sparse_attention`.
        query_offset: the passes' own, whose rows of the layout are then kept as long as the layout;
            None for passes of as many queries as the layout has rows for.
        backend: the one that will be asked for; hopper's kernels need lists of work.

    Raises:
        ConfigError: (a ValueError) shapes, dtypes, devices, layout or backend do not fit.
    """
    check_tensors(q, k, k, None)
    if query_offset is not None:
        _check_query_offset(query_offset)
    _check_layout(layout, q, k, query_offset)
    if backend not in BACKENDS:
        raise ConfigError(unknown_name("attention backend", backend, BACKENDS))
    query_offset = query_offset or 0
    layout = rows_of_queries(layout, q.shape[2], query_offset, hold=True)
    if backend == "hopper" or (backend == "auto" and q.is_cuda):
        from spion_ds.attention.hopper import backend as hopper_backend

        hopper_backend.prepare(q, k, layout, backend, query_offset)


def stand_in(x: Tensor) -> Tensor:
    """Return a tensor of x's shape, dtype and device that takes no memory, to prepare with."""
    return x.detach().new_empty(1).expand(x.shape)


def choose_backend(q: Tensor, layout: BlockLayout, options: AttentionOptions) -> str:
    """Return the backend that ``backend="auto"`` takes: kernels of q's device where they serve."""
    if q.is_cuda:
        from spion_ds.attention.hopper import backend as hopper_backend

        if hopper_backend.serves_auto(q, layout, options):
            return "hopper"
    if q.is_cuda and HAS_TRITON:
        from spion_ds.attention.triton import backend as triton_backend

        if triton_backend.unsupported(q, layout.block) is None:
            return "triton"
    if q.device.type == "cpu":
        from spion_ds.attention.cpu import backend as cpu_backend

        if cpu_backend.unsupported(q, layout) is None:
            return "cpp"
    return "torch"


def _implementation(backend: str) -> Callable[..., Tensor]:
    """Return a backend's function; what it needs is imported with it."""
    if backend == "triton":
        from spion_ds.attention.triton import backend as triton_backend

        return triton_backend.block_sparse_attention_triton
    if backend == "hopper":
        from spion_ds.attention.hopper import backend as hopper_backend

        return hopper_backend.block_sparse_attention_hopper
    if backend == "cpp":
        from spion_ds.attention.cpu import backend as cpu_backend

        return cpu_backend.block_sparse_attention_cpu
    if backend == "torch":
        return block_sparse_attention_torch
    return block_sparse_attention_reference


def check_tensors(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> None:
    """Raise ConfigError unless the tensors fit each other, as in :func:`block_sparse_attention`."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise ConfigError(
            "q is (batch, heads, L, head_dim) and k, v (batch, kv_heads, M, head_dim); "
            f"got {_shapes(q, k, v)}"
        )
    if q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1] != 0:
        raise ConfigError(
            f"q and k share head_dim, and k's heads divide q's; got {_shapes(q, k, v)}"
        )
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ConfigError(
            f"q, k and v share one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not (q.device == k.device == v.device):
        raise ConfigError(f"q, k and v share a device; got {q.device}, {k.device}, {v.device}")
    if key_padding_mask is None:
        return
    expected = (k.shape[0], k.shape[2])
    if tuple(key_padding_mask.shape) != expected or key_padding_mask.dtype != torch.bool:
        raise ConfigError(
            f"key_padding_mask is bool {expected}, True = real token; got "
            f"{key_padding_mask.dtype} {tuple(key_padding_mask.shape)}. A mask of 1 and 0 becomes "
            "one by mask.bool(), an additive one (0 and large negative numbers) by mask == 0"
        )
    if key_padding_mask.device != q.device:
        raise ConfigError(f"key_padding_mask is on {key_padding_mask.device}, q on {q.device}")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def _check_query_offset(
    query_offset: int, dropout_p: float = 0.0, zero_padded_queries: bool = False
) -> None:
    if not isinstance(query_offset, int) or isinstance(query_offset, bool) or query_offset < 0:
        raise ConfigError(
            f"query_offset is {query_offset!r}; allowed: an int from 0 up, the position of the "
            "first query"
        )
    if query_offset == 0:
        return
    if dropout_p > 0.0:
        raise ConfigError(
            f"query_offset is {query_offset} and dropout_p {dropout_p}; allowed: one of the two. "
            "What dropout drops is a function of a query's number in its call, so a part of the "
            "queries would not be treated as in the whole; set dropout_p=0.0"
        )
    if zero_padded_queries:
        raise ConfigError(
            f"query_offset is {query_offset} and zero_padded_queries True; allowed: one of the "
            "two. zero_padded_queries is for self-attention, where key_padding_mask is of the "
            "queries too; set zero_padded_queries=False"
        )


def _check_layout(layout: BlockLayout, q: Tensor, k: Tensor, query_offset: int | None) -> None:
    """Raise unless the layout fits; ``query_offset`` None: with no more rows than q needs."""
    if isinstance(layout, Tensor):
        raise ConfigError(
            f"layout is a Tensor {tuple(layout.shape)}, a mask where a layout belongs: "
            "BlockLayout.from_mask(mask, block)"
        )
    queries, keys, first = q.shape[2], k.shape[2], query_offset or 0
    rows, cols = -(-(first + queries) // layout.block), -(-keys // layout.block)
    enough = layout.num_rows == rows if query_offset is None else layout.num_rows >= rows
    if not enough or layout.num_cols != cols or queries == 0:
        where = f" from position {first} on" if first else ""
        raise ConfigError(
            f"the layout is {layout.num_rows}×{layout.num_cols} blocks of {layout.block}; "
            f"{queries} queries{where} and {keys} keys need {rows}×{cols}"
            f"{'' if query_offset is None else ', or more rows'}"
        )
    if layout.heads not in (1, q.shape[1]):
        raise ConfigError(
            f"the layout has {layout.heads} heads; allowed: 1 (shared) or q's {q.shape[1]}"
        )
    if layout.device != q.device:
        raise ConfigError(
            f"the layout is on {layout.device}, q on {q.device}; call layout.to({str(q.device)!r})"
        )


def _check_dropout_key(dropout_key: Tensor | None, q: Tensor) -> Tensor:
    if dropout_key is None:
        bounds = torch.iinfo(torch.int32)
        return torch.randint(
            bounds.min, bounds.max, (q.shape[0],), dtype=torch.int32, device=q.device
        )
    if dropout_key.dtype != torch.int32 or tuple(dropout_key.shape) != (q.shape[0],):
        raise ConfigError(
            f"dropout_key is int32 ({q.shape[0]},), one key a sample; got {dropout_key.dtype} "
            f"{tuple(dropout_key.shape)}"
        )
    if dropout_key.device != q.device:
        raise ConfigError(f"dropout_key is on {dropout_key.device}, q on {q.device}")
    return dropout_key
