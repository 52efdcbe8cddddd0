"""SwitchingSparsityConfig: dense until a pattern is set, then that pattern; and who finds it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spion_ds.errors import ConfigError, unknown_name
from spion_ds.patterns import pool_map
from spion_ds.sparsity.config import SparsityConfig

LONGER = ("error", "local")


class SwitchingSparsityConfig(SparsityConfig):
    """The block pattern of one layer, found in training: shared by all its heads, or one a head.

    With grouped-query attention maps and patterns are those of the query heads.

    Args:
        num_heads: (query) heads of the layer.
        block: side of a block in tokens.
        different_layout_per_head: one pattern a head.
        causal: whether attention is causal, so that only blocks on and below the diagonal may be
            kept; ``SparseSelfAttention(causal=True)`` makes it so.

    Raises:
        ConfigError: names the argument, its value and what is allowed.
    """

    causal: bool = False  # also where a subclass does not call __init__

    def __init__(
        self,
        num_heads: int,
        block: int = 64,
        different_layout_per_head: bool = False,
        causal: bool = False,
    ) -> None:
        if not isinstance(different_layout_per_head, bool):
            raise ConfigError(
                f"different_layout_per_head is {different_layout_per_head!r}; allowed: True or "
                "False"
            )
        super().__init__(num_heads, block, different_layout_per_head)
        self.causal = causal
        self._pattern: Tensor | None = None

    @property
    def pattern(self) -> Tensor | None:
        """The bool pattern on the CPU, or None while the layer is dense; not to be written to.

        (n, n), or (num_heads, n, n) with one a head.
        """
        return self._pattern

    @property
    def convolution(self) -> int | None:
        """The filter size that the layer's pooled map is made with, None without one."""
        return None

    def pool(self, attention_map: Tensor) -> Tensor:
        """Return the pooled float64 map of a token-level map, as this layer wants it.

        (n, n) of (L, L), or (heads, n, n) of (heads, L, L) with one pattern a head.
        """
        if not self.different_layout_per_head:
            return pool_map(attention_map, self.block, self.convolution)
        check_maps("attention_map", attention_map, self.num_heads)
        return torch.stack([pool_map(a, self.block, self.convolution) for a in attention_map])

    def check_room(self, blocks: int) -> None:
        """Raise ConfigError if ``blocks`` a side have no room for what a pattern must keep."""

    def find_pattern(self, source: Tensor) -> Tensor:
        """Return the pattern that ``source`` gives, in the shape of ``pattern``; sets nothing."""
        raise NotImplementedError(f"{type(self).__name__} does not define find_pattern")

    @classmethod
    def find_patterns(
        cls, configs: Sequence[SwitchingSparsityConfig], sources: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the patterns of the layers of this class, each from its source; sets nothing.

        A class whose layers compete for blocks defines this one; here each layer is alone.
        """
        pairs = zip(configs, sources, strict=True)
        return [config.find_pattern(source) for config, source in pairs]

    def set_pattern(self, pattern: Tensor | None) -> None:
        """Make the layer block-sparse with a copy of ``pattern``, or dense again with None.

        Args:
            pattern: bool, or a number type with only 0 and 1; (n, n), or (num_heads, n, n) with
                one a head; on any device.

        Raises:
            ConfigError: another shape, other values, or no tensor; nothing is set.
        """
        self._pattern = None if pattern is None else self._checked(pattern)

    def make_layout(self, seq_len: int) -> Tensor:
        """Return the int64 layout (num_heads, n, n): all ones while there is no pattern.

        Raises:
            ConfigError: ``seq_len`` does not divide into blocks, or the pattern was found at
                fewer tokens.
        """
        layout = self.setup_layout(seq_len)
        layout[:] = self.make_mask(seq_len)
        return layout

    def make_mask(self, seq_len: int, longer: str = "error") -> Tensor:
        """Return the kept blocks for ``seq_len`` tokens: all True while there is no pattern.

        Shorter inputs than the pattern's get its upper left part.

        Args:
            seq_len: tokens, the last block partial or not.
            longer: what longer inputs are: ``"error"``, or ``"local"``: beyond the pattern a block
                keeps itself, one neighbour on each side and the first block; the pattern's last
                block keeps its new neighbour too. (For causal attention take the lower triangle:
                the neighbours on the right lie above the diagonal.)

        Returns:
            (n, n) bool on the CPU, or (num_heads, n, n) with one pattern a head, n =
            ceil(seq_len / block). Not to be written to: it may be the pattern itself.

        Raises:
            ConfigError: the input is longer than the pattern and ``longer`` is ``"error"``, or
                ``longer`` is none of the two.
        """
        if longer not in LONGER:
            raise ConfigError(unknown_name("value of longer", longer, LONGER))
        n = -(-seq_len // self.block)
        if self._pattern is None:
            heads = (self.num_heads,) if self.different_layout_per_head else ()
            return torch.ones((*heads, n, n), dtype=torch.bool)
        found = self._pattern.shape[-1]
        if n == found:
            return self._pattern
        if n < found:
            return self._pattern[..., :n, :n]
        if longer == "error":
            captured = found * self.block
            raise ConfigError(
                f"the pattern was found at {captured} tokens and the input has {seq_len}; cut the "
                f"input to {captured} tokens, find a pattern at this length, or go on with local "
                'blocks: longer="local"'
            )
        return _extended(self._pattern, n)

    def _checked(self, pattern: Tensor) -> Tensor:
        if not isinstance(pattern, Tensor):
            kind = type(pattern).__name__
            remedy = "pass layout.to_mask()" if kind == "BlockLayout" else "pass torch.tensor(…)"
            raise ConfigError(f"pattern is a {kind}; allowed: a tensor of 0 and 1; {remedy}")
        shape, per_head = tuple(pattern.shape), self.different_layout_per_head
        leading = (self.num_heads,) if per_head else ()
        square = len(shape) >= 2 and shape[-1] == shape[-2] and shape[-1] > 0
        if not square or shape[:-2] != leading:
            wanted = (
                f"({self.num_heads}, n, n), a square mask for each of the {self.num_heads} heads "
                "(different_layout_per_head is True)"
                if per_head
                else "a square (n, n) mask for all heads (different_layout_per_head is False)"
            )
            raise ConfigError(f"pattern has shape {shape}; allowed: {wanted}")
        if pattern.dtype != torch.bool and not bool(((pattern == 0) | (pattern == 1)).all()):
            raise ConfigError(
                f"pattern ({pattern.dtype}) holds other values than 0 and 1; allowed: True and "
                "False, or 1 and 0: for a map of numbers use find_pattern, or compare it with a "
                "threshold"
            )
        # A copy, and another object each time: who derives something from it goes by identity.
        return pattern.detach().to("cpu", torch.bool, copy=True).contiguous()


def find_patterns(
    configs: Sequence[SwitchingSparsityConfig], sources: Sequence[Tensor]
) -> list[Tensor]:
    """Return the pattern of every layer: the one function that makes them; it sets nothing.

    The layers of each class go together to that class's ``find_patterns``, in their order.

    Args:
        configs: one a layer; blocks, head counts and classes may differ.
        sources: one a layer: the pooled map, (n, n) float64, or (heads, n, n) for a configuration
            with one pattern a head; for SAT its W, (n, head_dim).

    Returns:
        One bool pattern a layer, (n, n) or (heads, n, n), on its source's device.

    Raises:
        ConfigError: another number of sources than layers, or a source that does not fit its
            layer or is not finite.
    """
    if len(configs) != len(sources):
        raise ConfigError(
            f"sources has {len(sources)} entries for {len(configs)} layers; allowed: one a layer"
        )
    layers_of: dict[type[SwitchingSparsityConfig], list[int]] = {}
    for layer, config in enumerate(configs):
        if not isinstance(config, SwitchingSparsityConfig):
            raise ConfigError(
                f"configs: layer {layer} has a {type(config).__name__}, whose pattern is static; "
                "allowed: a SpionSparsityConfig, or another SwitchingSparsityConfig"
            )
        layers_of.setdefault(type(config), []).append(layer)
    patterns: dict[int, Tensor] = {}
    for kind, layers in layers_of.items():
        found = kind.find_patterns([configs[i] for i in layers], [sources[i] for i in layers])
        if len(found) != len(layers):
            raise ConfigError(
                f"{kind.__name__}.find_patterns returned {len(found)} patterns for {len(layers)} "
                "layers; allowed: one a layer, in their order"
            )
        patterns.update(zip(layers, found, strict=True))
    return [patterns[layer] for layer in range(len(configs))]


def check_maps(name: str, maps: Tensor, heads: int) -> None:
    """Raise ConfigError unless ``maps`` has a square map for each of the heads."""
    shape = tuple(maps.shape)
    if len(shape) != 3 or shape[0] != heads or shape[1] != shape[2] or 0 in shape:
        raise ConfigError(
            f"{name} has shape {shape}; allowed: ({heads}, n, n), a map a head, since "
            "different_layout_per_head is True"
        )


def _extended(pattern: Tensor, n: int) -> Tensor:
    """Return (…, n, n): the pattern, and local blocks beyond it."""
    found = pattern.shape[-1]
    place = torch.arange(n)
    local = (place[:, None] - place).abs() <= 1
    local[:, 0] = True
    mask = local.expand(*pattern.shape[:-2], n, n).clone()
    mask[..., :found, :found] = pattern
    # An old row keeps of the new blocks its neighbour alone, which local says already.
    return mask
