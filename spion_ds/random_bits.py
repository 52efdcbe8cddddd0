"""Counter-based random bits: every draw is a hash of where it is taken, never of a state.

A draw depends on a key (one int32 a sample, made from seed, step, sample and place in the model)
and on the element's coordinates. So it is the same on every device and in every backend, and does
not depend on how a batch is split over ranks and micro-batches.

Keys (of samples, heads, rows) come from a 32-bit xor-shift-multiply finaliser, ``mix``. An element
costs three instructions more: xor, product and comparison of what its row and its column have
prepared (``keep_mask``). All arithmetic wraps in int32.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Odd constants; as signed int32 they wrap the same way as uint32.
MULTIPLY_1 = 0x7FEB352D
MULTIPLY_2 = 0x846CA68B - 2**32
STRIDE = 0x9E3779B9 - 2**32


def mix(x: Tensor) -> Tensor:
    """Return the hash of each int32 in ``x``; ``x`` itself is overwritten.

    x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16
    with logical shifts on 32 bits.
    """
    x ^= (x >> 16) & 0xFFFF
    x *= MULTIPLY_1
    x ^= (x >> 15) & 0x1FFFF
    x *= MULTIPLY_2
    x ^= (x >> 16) & 0xFFFF
    return x


def combine(key: Tensor, counter: Tensor | int) -> Tensor:
    """Return the key (int32) of the sub-stream ``counter`` of ``key``: mix(key + counter·stride).

    The two broadcast against each other; counters are taken modulo 2^32.
    """
    if isinstance(counter, int):
        return mix(key + _wrap((counter + 1) * STRIDE))
    return (_combine_op if _overflows(key) else _combine)(key, counter)


def _combine(key: Tensor, counter: Tensor) -> Tensor:
    return mix(key + (counter.to(torch.int32) + 1) * STRIDE)


def sample_keys(seed: int, step: int, samples: Tensor, places: int) -> Tensor:
    """Return the dropout keys (places, batch) int32 of a micro-batch.

    Args:
        seed: the run's seed.
        step: optimizer step.
        samples: (batch,) integer position of each sample in the step's global batch.
        places: how many places in the model draw a mask.
    """
    key = np.zeros(1, dtype=np.uint32)
    for number in (seed, step):
        key = _combine_numbers(key, np.array([number % 2**32]))
    key = _combine_numbers(key, samples.numpy(force=True))
    keys = _combine_numbers(key, np.arange(places)[:, None])
    return torch.from_numpy(keys.view(np.int32)).to(samples.device)


def _combine_numbers(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """Return ``combine`` of keys in uint32, so few of them that tensors would cost far more."""
    x = key + ((counter + 1) * STRIDE).astype(np.uint32)
    x ^= x >> 16
    x *= MULTIPLY_1
    x ^= x >> 15
    x *= MULTIPLY_2 % 2**32
    x ^= x >> 16
    return x


def keep_threshold(p: float) -> int:
    """Return t, an int32, such that an element is kept when its bits, signed, are >= t.

    The probability of dropping is then within 2^-32 of ``p``; it is never 1.
    """
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def keep_mask(row_keys: Tensor, columns: Tensor, p: float) -> Tensor:
    """Return which elements are kept, bool of the broadcast shape of the two arguments.

    bits = (row_key ^ word) · (row_key · 0x846ca68b | 1), kept when bits, signed, >= threshold;
    word = (u ^ u >> 16) · 0x7feb352d with u = (column + 1) · stride and a logical shift.

    The multiplier is the row's own, so two rows do not walk through one sequence. The words have
    no pattern of differences that a product would keep, and the xor breaks sums of them. What
    fails without each is in docs/attention.md.

    Args:
        row_keys: int32 key of each row of elements.
        columns: int32 coordinate of each element in its row.
        p: probability of dropping.
    """
    return (_keep_mask_op if _overflows(row_keys) else _keep_mask)(row_keys, columns, p)


def _keep_mask(row_keys: Tensor, columns: Tensor, p: float) -> Tensor:
    word = (columns.to(torch.int32) + 1) * STRIDE
    word = (word ^ ((word >> 16) & 0xFFFF)) * MULTIPLY_1
    bits = row_keys ^ word
    bits *= row_keys * MULTIPLY_2 | 1
    return bits >= keep_threshold(p)


def _overflows(x: Tensor) -> bool:
    """Return whether the formulas must be hidden from the compiler that traces this call.

    Inductor's C++ for CPUs overflows signed integers, of which a compiler may make anything.
    """
    return x.device.type == "cpu" and torch.compiler.is_compiling()


_combine_op = torch.library.custom_op(
    "spion_ds::combine", _combine, mutates_args=(), schema="(Tensor key, Tensor counter) -> Tensor"
)


_keep_mask_op = torch.library.custom_op(
    "spion_ds::keep_mask",
    _keep_mask,
    mutates_args=(),
    schema="(Tensor row_keys, Tensor columns, float p) -> Tensor",
)


_combine_op.register_fake(
    lambda key, counter: key.new_empty(torch.broadcast_shapes(key.shape, counter.shape))
)
_keep_mask_op.register_fake(
    lambda row_keys, columns, p: row_keys.new_empty(
        torch.broadcast_shapes(row_keys.shape, columns.shape), dtype=torch.bool
    )
)


def _wrap(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31
