"""Optimizers for bare PyTorch loops; nothing in here knows Hugging Face."""

from hf_elra.optim.averaging import WeightAverage
from hf_elra.optim.directions import embeddings_of, experts_of
from hf_elra.optim.elra import ELRA
from hf_elra.optim.loss_aware import LossAwareOptimizer
from hf_elra.optim.spectral import ELRASpectral

__all__ = ["ELRA", "ELRASpectral", "LossAwareOptimizer", "WeightAverage", "embeddings_of", "experts_of"]
