"""The encoder, its heads, and trained models as folders."""

from spion_ds.models.config import ModelConfig
from spion_ds.models.encoder import EncoderClassifier
from spion_ds.models.saved import load_model, save_model

__all__ = ["EncoderClassifier", "ModelConfig", "load_model", "save_model"]
