"""MaskHolder: a module's block mask, in its SparsityConfig and in a buffer of its state_dict."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spion_ds.attention.mask_buffer import MaskFormat, read_header
from spion_ds.attention.observing import captures
from spion_ds.errors import ConfigError
from spion_ds.sparsity import SparsityConfig, SwitchingSparsityConfig

_BUFFER = "packed_mask"


class Known:
    """What a module has derived its layouts from.

    An object, since torch.compile compares tensors by identity only there: in PyTorch 2.8 it skips
    that for a module's own attributes.

    Attributes:
        pattern: of the configuration.
        buffer: that was read last.
        version: of the buffer then; None where it has none.
    """

    def __init__(self) -> None:
        self.pattern: Tensor | None = None
        self.buffer: Tensor | None = None
        self.version: int | None = None


class MaskHolder(nn.Module):
    """The mask of SparseSelfAttention, whose docstring says what it promises.

    The buffer wins: what was loaded or copied into it goes to the configuration at the next pass. A
    pattern that goes to the configuration alone would be in no checkpoint, so it is refused.

    Args:
        sparsity_config: its ``pattern`` is the mask, if it is found in training.
        max_seq_length: longest input in tokens, which makes the buffer; None for none.

    Attributes:
        packed_mask: (bytes,) uint8 as in mask_buffer.py, or None.
    """

    packed_mask: Tensor | None
    _known: Known
    # What belongs to one object: copies and pickles make their own.
    own: ClassVar[tuple[str, ...]] = ("_known",)

    def __init__(self, sparsity_config: SparsityConfig, max_seq_length: int | None) -> None:
        super().__init__()
        whole = isinstance(max_seq_length, int) and not isinstance(max_seq_length, bool)
        if max_seq_length is not None and not (whole and max_seq_length >= 1):
            raise ConfigError(
                f"max_seq_length is {max_seq_length!r}; allowed: a whole number from 1 up, or None "
                "for a module without a buffer"
            )
        self.sparsity_config, self.max_seq_length = sparsity_config, max_seq_length
        self._format: MaskFormat | None = None
        # Of the mask that the buffer and the configuration agreed on last.
        self._header = b""
        self._forget()
        self.register_buffer(_BUFFER, None)
        if max_seq_length is not None and isinstance(sparsity_config, SwitchingSparsityConfig):
            per_head = sparsity_config.different_layout_per_head
            self._format = MaskFormat(
                -(-max_seq_length // sparsity_config.block),
                sparsity_config.block,
                sparsity_config.num_heads if per_head else None,
            )
            with torch.inference_mode(False):
                self.packed_mask = torch.empty(self._format.size, dtype=torch.uint8)
            self.reset_parameters()

    def set_mask(self, mask: Tensor | None) -> None:
        """Make the layer block-sparse with ``mask``, or dense with None.

        What compiled and captured passes need of it is derived here again. A compiled pass is not
        traced again for another mask. A CUDA graph reads the memory of the old one, which is freed
        here: it must not be replayed, but captured anew.

        Args:
            mask: bool, or 0 and 1; (n, n), or (num_heads, n, n) where the configuration has one
                layout a head. With ``max_seq_length`` n is ceil(max_seq_length / block).

        Raises:
            ConfigError: the mask does not fit, or the configuration's layout is static.
        """
        config = self.sparsity_config
        if not isinstance(config, SwitchingSparsityConfig):
            raise ConfigError(
                f"sparsity_config is a {type(config).__name__}, whose layout is static; masks are "
                "for a SpionSparsityConfig or another SwitchingSparsityConfig"
            )
        if self._format is not None and isinstance(mask, Tensor):
            self._format.check(mask)
        config.set_pattern(mask)
        self._write()
        self._follow()

    def refresh(self) -> None:
        """Take in what ``packed_mask`` holds now, and derive what compiled passes need of it.

        Raises:
            CheckpointError: it holds no mask of this module.
            ConfigError: the configuration's pattern was set past :meth:`set_mask`.
        """
        self._known.buffer = None
        self._follow()

    def reset_parameters(self) -> None:
        """Write the configuration's pattern into the buffer, as is needed after ``to_empty()``."""
        self._write()
        self._known.buffer = None  # whatever comes before the first pass: that reads it once

    def check_unchanged(self) -> None:
        """Raise ConfigError where the mask is not the one that was compiled; called as it runs."""
        if self._unread():
            raise ConfigError(
                "packed_mask was written to behind a compiled pass, which still has the mask from "
                "before; call attention.refresh() before the next pass (load_state_dict and "
                "attention.set_mask need no such call)"
            )

    def _follow(self) -> None:
        """Bring buffer, configuration and what is derived from them together."""
        config, known = self.sparsity_config, self._known
        pattern = getattr(config, "pattern", None)
        if self._format is not None:
            if self._unread():
                self._take_in()
                pattern = getattr(config, "pattern", None)
            elif pattern is not known.pattern:
                self._check_agreement(pattern)
        if pattern is not known.pattern:
            known.pattern = pattern
            self._derive_again()

    def _derive_again(self) -> None:
        """Replace what was derived from another pattern; a subclass knows what that is."""

    def _unread(self) -> bool:
        """Return whether the buffer holds another mask than the one that was read last.

        Where the tensor is the same and only its version moved, as by DDP's broadcasts, its header
        tells: on a GPU that waits for the GPU. On a CPU the header is read each time, since what
        goes past autograd (``.data``, NumPy, collectives) moves no version.

        Raises:
            CheckpointError: it holds no mask of this module.
        """
        buffer = self.packed_mask
        if buffer is None or self._format is None or buffer.is_meta:
            return False
        known, version = self._known, None if buffer.is_inference() else buffer._version
        if (
            known.buffer is buffer
            and version is not None
            and version == known.version
            and not buffer.is_cpu
        ):
            return False
        if captures(buffer.device):
            raise ConfigError(
                "packed_mask was written to, and a CUDA graph is being captured, in which it "
                "cannot be read; call attention.refresh() before the capture"
            )
        if known.buffer is not buffer:
            self._format.unpack(buffer)  # raises what is wrong
        if read_header(buffer) != self._header:
            return True
        known.buffer, known.version = buffer, version
        return False

    def _take_in(self) -> None:
        """Give the configuration the mask that the buffer holds."""
        assert self._format is not None
        assert self.packed_mask is not None
        mask = self._format.unpack(self.packed_mask)
        self.sparsity_config.set_pattern(mask)  # type: ignore[attr-defined]
        self._header = read_header(self.packed_mask)
        self._unread()  # notes the version

    def _write(self) -> None:
        """Write the configuration's pattern into the buffer, if there is one."""
        buffer = self.packed_mask
        if self._format is None or buffer is None or buffer.is_meta:
            return
        packed = self._format.pack(self.sparsity_config.pattern)  # type: ignore[attr-defined]
        if buffer.dtype != packed.dtype or buffer.shape != packed.shape:
            self._format.unpack(buffer)  # raises what is wrong
        with torch.inference_mode(buffer.is_inference()):
            buffer.copy_(packed)
        self._header = read_header(packed)
        self._known.buffer = buffer
        self._known.version = None if buffer.is_inference() else buffer._version

    def _check_agreement(self, pattern: Tensor | None) -> None:
        """Raise ConfigError unless the configuration has the mask that was last in the buffer."""
        assert self._format is not None
        if read_header(self._format.pack(pattern)) != self._header:
            raise ConfigError(
                "the pattern of sparsity_config is not the mask in packed_mask: it was set by "
                "sparsity_config.set_pattern, or two attentions share one configuration. Give each "
                "attention its own, and call attention.set_mask(mask), which sets both"
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pattern, buffer = getattr(self.sparsity_config, "pattern", None), self.packed_mask
        if buffer is not None and not buffer.is_meta and pattern is not self._known.pattern:
            # It is saved as it is: it must not be the older of the two.
            unchanged = read_header(buffer) == self._header
            if unchanged:
                self._check_agreement(pattern)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        given = state_dict.get(prefix + _BUFFER)
        if self._format is None:
            if given is not None:
                lists[-1].append(
                    f"{prefix}{_BUFFER} is a block mask, and this attention has no buffer for it: "
                    "make it with the max_seq_length of the model that was saved"
                )
        elif isinstance(given, Tensor) and not given.is_meta:
            self._format.unpack(given)  # raises what is wrong, before anything is overwritten
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        if given is not None and self.packed_mask is not None and not self.packed_mask.is_meta:
            # What is loaded is right, whatever the configuration had.
            pattern = getattr(self.sparsity_config, "pattern", None)
            if self._unread() or pattern is not self._known.pattern:
                self._take_in()
            self._follow()

    def _forget(self) -> None:
        """Set what belongs to one object, in a new one."""
        self._known = Known()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self.own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
