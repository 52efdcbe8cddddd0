"""The encoder and its heads."""

from spion_ds.models.encoder import EncoderClassifier, ModelConfig

__all__ = ["EncoderClassifier", "ModelConfig"]
