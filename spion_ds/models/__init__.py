"""The encoder, its heads, its block masks, and trained models as folders."""

from spion_ds.models.encoder import EncoderClassifier, ModelConfig
from spion_ds.models.masks import get_masks, set_masks
from spion_ds.models.saved import load_model, save_model

__all__ = [
    "EncoderClassifier",
    "ModelConfig",
    "get_masks",
    "load_model",
    "save_model",
    "set_masks",
]
