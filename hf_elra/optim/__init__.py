"""Optimizers for bare PyTorch loops; nothing in here knows Hugging Face."""

from hf_elra.optim.elra import ELRA

__all__ = ["ELRA"]
