"""Which blocks of attention matter, and when to switch: pure functions on attention maps."""

from spion_ds.patterns.budget import budget_patterns
from spion_ds.patterns.flood_fill import flood_fill
from spion_ds.patterns.pooling import pool_map
from spion_ds.patterns.sat import pattern_loss, sat_pattern
from spion_ds.patterns.spion import pattern_from_pooled, spion_c, spion_cf, spion_f
from spion_ds.patterns.transition import (
    DistanceRule,
    FixedStepRule,
    SkewnessRule,
    TransitionReport,
    TransitionRule,
)

__all__ = [
    "DistanceRule",
    "FixedStepRule",
    "SkewnessRule",
    "TransitionReport",
    "TransitionRule",
    "budget_patterns",
    "flood_fill",
    "pattern_from_pooled",
    "pattern_loss",
    "pool_map",
    "sat_pattern",
    "spion_c",
    "spion_cf",
    "spion_f",
]
