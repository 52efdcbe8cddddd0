"""A layer's block mask in one uint8 tensor, which a state_dict can carry: header and bits.

The tensor has its final size from the start, so that a switch changes no shape and no key.

    bytes   0:24   magic, format, phase (0 dense, 1 sparse), layout heads, blocks a side, block
           24:56   sha256 of all other bytes
           56:64   0
           64:     the kept blocks as bits, (layout heads, blocks, blocks), 0 while dense
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from spion_ds.attention.layout import pack_mask, unpack_mask
from spion_ds.errors import CheckpointError, ConfigError

HEADER_BYTES = 64
_MAGIC, _FORMAT = b"SPIONMSK", 1
_FIELDS = struct.Struct("<8sHBxIII")
_DIGEST = slice(_FIELDS.size, _FIELDS.size + 32)


@dataclass(frozen=True)
class MaskFormat:
    """Which masks a buffer holds: bool (blocks, blocks), or (heads, blocks, blocks).

    Attributes:
        blocks: blocks a side.
        block: side of a block in tokens.
        heads: of a mask with one layout a head; None for a mask that all heads share.
    """

    blocks: int
    block: int
    heads: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a mask."""
        square = (self.blocks, self.blocks)
        return square if self.heads is None else (self.heads, *square)

    @property
    def size(self) -> int:
        """Bytes of a packed mask."""
        return HEADER_BYTES + -(-(self.heads or 1) * self.blocks**2 // 8)

    def check(self, mask: Tensor) -> None:
        """Raise ConfigError unless a mask has the shape that the buffer holds."""
        if tuple(mask.shape) != self.shape:
            raise ConfigError(
                f"the mask has shape {tuple(mask.shape)}; allowed: {self.shape}, for which "
                "max_seq_length, the block and the layout heads made room in packed_mask"
            )

    def pack(self, mask: Tensor | None) -> Tensor:
        """Return a mask, or the dense phase for None, as (size,) uint8 on the CPU."""
        bits = bytes(self.size - HEADER_BYTES)
        if mask is not None:
            self.check(mask)
            bits = pack_mask(mask)
        fields = _FIELDS.pack(
            *(_MAGIC, _FORMAT, mask is not None, self.heads or 1, self.blocks, self.block)
        )
        rest = bytes(HEADER_BYTES - _DIGEST.stop) + bits
        digest = hashlib.sha256(fields + rest).digest()
        return torch.frombuffer(bytearray(fields + digest + rest), dtype=torch.uint8)

    def unpack(self, packed: Tensor) -> Tensor | None:
        """Return the bool mask on the CPU, in ``shape``, or None for the dense phase.

        Raises:
            CheckpointError: not what :meth:`pack` made, or made for masks of another format.
        """
        if packed.dtype != torch.uint8:
            raise CheckpointError(
                f"packed_mask is {packed.dtype}; allowed: uint8, since its bytes are bits of a "
                "mask. Module.half(), .bfloat16() and .to(dtype) leave it alone, .type(dtype) "
                "casts it: cast parameters only, then load the state_dict again"
            )
        if packed.dim() != 1 or packed.numel() < HEADER_BYTES:
            raise CheckpointError(
                f"packed_mask has shape {tuple(packed.shape)}; allowed: ({self.size},), for "
                f"{self._words()}: it is not of this model"
            )
        data = packed.detach().cpu().numpy().tobytes()
        magic, version, phase, heads, blocks, block = _FIELDS.unpack_from(data)
        if magic != _MAGIC:
            raise CheckpointError(
                "packed_mask holds no mask: its memory was never written (as after to_empty()), "
                "or calculated with (as an average of models does that averages buffers: average "
                "parameters only). Load a state_dict, or call attention.set_mask(mask), or "
                "attention.set_mask(None) for the dense phase"
            )
        if version != _FORMAT:
            raise CheckpointError(
                f"packed_mask has format {version}; allowed: {_FORMAT}. Use the version of "
                "spion_ds that saved it, or a newer one"
            )
        if (heads, blocks, block) != (self.heads or 1, self.blocks, self.block):
            raise CheckpointError(
                f"packed_mask holds {_words(heads, blocks, block)}; allowed: {self._words()}. It "
                "is of another model: build this one with the same max_seq_length, block, and "
                "layouts a head or shared"
            )
        others = data[: _DIGEST.start] + data[_DIGEST.stop :]
        if len(data) != self.size or hashlib.sha256(others).digest() != data[_DIGEST]:
            raise CheckpointError(
                "packed_mask has another digest than its mask: it was damaged, or calculated with "
                "(as an average of models does that averages buffers: average parameters only). "
                "Load a state_dict, or call attention.set_mask(mask)"
            )
        return unpack_mask(data[HEADER_BYTES:], self.shape) if phase else None

    def _words(self) -> str:
        return _words(self.heads or 1, self.blocks, self.block)


def _words(heads: int, blocks: int, block: int) -> str:
    of_heads = "shared by all heads" if heads == 1 else f"for each of {heads} heads"
    return f"a mask of {blocks}×{blocks} blocks of {block} tokens, {of_heads}"


def read_header(packed: Tensor) -> bytes:
    """Return the first HEADER_BYTES; of a tensor on a GPU that waits for the GPU."""
    return packed.detach()[:HEADER_BYTES].cpu().numpy().tobytes()
