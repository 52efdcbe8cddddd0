"""What a model's inputs must be: said before a kernel stumbles over them."""

from __future__ import annotations

import torch
from torch import Tensor

from spion_ds.attention.observing import captures
from spion_ds.errors import DataError


def check_shapes(input_ids: Tensor, padding_mask: Tensor, documents: int, max_length: int) -> None:
    """Raise DataError unless a model can take inputs of these shapes and dtypes.

    Args:
        input_ids, padding_mask: as of ``EncoderClassifier.forward``.
        documents: sequences of a sample, 1 or 2.
        max_length: longest input, in tokens.
    """
    shape, two = tuple(input_ids.shape), documents > 1
    fits = len(shape) == 2 + two and (not two or shape[1] == 2) and 1 <= shape[-1] <= max_length
    if not fits or input_ids.dtype not in (torch.int64, torch.int32):
        raise DataError(
            f"input_ids are {shape} {input_ids.dtype}; the model takes "
            f"({'B, 2, L' if two else 'B, L'}) int64 with L from 1 to {max_length}: cut longer "
            "inputs, or train a model for their length"
        )
    if tuple(padding_mask.shape) != shape or padding_mask.dtype != torch.bool:
        raise DataError(
            f"padding_mask is {tuple(padding_mask.shape)} {padding_mask.dtype}; allowed: bool "
            f"{shape}, as input_ids, True = real token"
        )


def check_ids(input_ids: Tensor, ids: int) -> None:
    """Raise DataError unless all ``input_ids`` are from 0 to ``ids`` - 1; waits for the device.

    A CUDA device cannot say which id an embedding lacks, and is lost to the process. Within
    compiled and captured passes nothing is checked.
    """
    if torch.compiler.is_compiling() or captures(input_ids.device) or not input_ids.numel():
        return
    lowest, highest = (int(end) for end in torch.aminmax(input_ids))
    if lowest < 0 or highest >= ids:
        raise DataError(
            f"input_ids go from {lowest} to {highest}; the model has the ids 0 to {ids - 1}: make "
            "them with the tokens that it was trained with"
        )
