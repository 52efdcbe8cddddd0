"""One decision for the whole job: rank 0 sends it, every rank checks what it received."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spion_ds.attention.layout import pack_mask, unpack_mask
from spion_ds.distributed.agreement import Agreement
from spion_ds.errors import SpionError
from spion_ds.switching.masks import masks_digest

_STAY, _MASKS, _FAILED = 0, 1, 2
_DIGEST_BYTES = 32
# The header: status, number of layers (or bytes of a failure's text) in 8 bytes, digest.
_HEADER_BYTES = 1 + 8 + _DIGEST_BYTES
_DIMENSIONS = 3
# Masks that are larger than this together travel a layer at a time.
_AT_ONCE_BYTES = 16 << 20


class CoordinationError(SpionError, RuntimeError):
    """Rank 0 could not decide, or a rank received something else than rank 0 sent."""


class PatternError(CoordinationError):
    """Rank 0 could not make patterns of the maps: one is not finite, or the rule refused it."""


def share_masks(
    masks: Sequence[Tensor] | None, failure: str, agreement: Agreement
) -> tuple[list[Tensor] | None, str]:
    """Send rank 0's decision to all ranks.

    One broadcast has the status and the digest. Masks follow with their shapes, as bits.

    Args:
        masks: of every layer of the job, or None to stay as things are; read on rank 0 only.
        failure: why rank 0 could not decide, else ""; read on rank 0 only.
        agreement: the control channel.

    Returns:
        The masks and their digest (hexadecimal), or None and "".

    Raises:
        PatternError: on all ranks, rank 0 gave a ``failure``.
        CoordinationError: on all ranks, one of them received something else than rank 0 sent.
    """
    header = torch.zeros(_HEADER_BYTES, dtype=torch.uint8)
    text = failure.encode()
    if agreement.is_first:
        if failure:
            _fill(header, _FAILED, len(text), bytes(_DIGEST_BYTES))
        elif masks is not None:
            _fill(header, _MASKS, len(masks), bytes.fromhex(masks_digest(masks)))
    raw = agreement.broadcast(header).numpy().tobytes()
    status, count = raw[0], int.from_bytes(raw[1:9], "little")
    if status == _FAILED:
        body = _sendable(text, count)
        text = agreement.broadcast(body).numpy().tobytes()
        raise PatternError(f"rank 0 could not decide: {text.decode(errors='replace')}")
    received: list[Tensor] = []
    if status == _MASKS:
        received = _share_bits(masks, count, agreement)
    digest = raw[9:].hex() if status == _MASKS else ""
    sound = masks_digest(received) == digest if status == _MASKS else status == _STAY
    # Nobody tells what it received but the digest, which says it all.
    if agreement.any(not sound) or (status != _STAY and agreement.differing(digest)):
        raise CoordinationError(
            "the masks that a rank received differ from those that rank 0 sent; the network or "
            "memory is faulty: go on from the last checkpoint"
        )
    return (received, digest) if status == _MASKS else (None, "")


def _share_bits(masks: Sequence[Tensor] | None, layers: int, agreement: Agreement) -> list[Tensor]:
    """Return the masks of all layers on every rank; their shapes go first."""
    shapes = torch.zeros((layers, _DIMENSIONS), dtype=torch.int64)
    packed: list[bytes] = []
    if agreement.is_first:
        assert masks is not None
        for layer, mask in enumerate(masks):
            shapes[layer, : mask.dim()] = torch.tensor(mask.shape)
        packed = [pack_mask(mask) for mask in masks]
    agreement.broadcast(shapes)
    sizes = [tuple(size for size in row if size > 0) for row in shapes.tolist()]
    lengths = [-(-torch.Size(size).numel() // 8) for size in sizes]
    if sum(lengths) <= _AT_ONCE_BYTES:
        whole = agreement.broadcast(_sendable(b"".join(packed), sum(lengths)))
        parts = [part.numpy().tobytes() for part in whole.split(lengths)]
    else:
        parts = [
            agreement.broadcast(_sendable(packed[layer] if packed else b"", length))
            .numpy()
            .tobytes()
            for layer, length in enumerate(lengths)
        ]
    return [unpack_mask(part, size) for part, size in zip(parts, sizes, strict=True)]


def _sendable(content: bytes, length: int) -> Tensor:
    """Return ``content`` as (length,) uint8; zeros, to be filled, where there is none."""
    if not content:
        return torch.zeros(length, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _fill(header: Tensor, status: int, count: int, digest: bytes) -> None:
    content = bytes([status]) + count.to_bytes(8, "little") + digest
    header.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
