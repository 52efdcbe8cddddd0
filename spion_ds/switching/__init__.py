"""Dense to sparse for any model and any loop."""

from spion_ds.switching.decision import CoordinationError, PatternError
from spion_ds.switching.dense_to_sparse import DenseToSparse
from spion_ds.switching.events import Event, Look

__all__ = ["CoordinationError", "DenseToSparse", "Event", "Look", "PatternError"]
