"""Optimizers for bare PyTorch loops; nothing in here knows Hugging Face."""

from hf_elra.optim.averaging import WeightAverage
from hf_elra.optim.base import LossAwareOptimizer
from hf_elra.optim.directions.spectral import embeddings_of, experts_of
from hf_elra.optim.elra import ELRA
from hf_elra.optim.natural_steps import adapters_of
from hf_elra.optim.spectral import ELRASpectral

OPTIMIZERS: dict[str, type[LossAwareOptimizer]] = {"elra": ELRA, "elra_spectral": ELRASpectral}
"""Optimizers by the names that ``--optim`` knows: a new one is a line here."""

__all__ = [
    "ELRA",
    "OPTIMIZERS",
    "ELRASpectral",
    "LossAwareOptimizer",
    "WeightAverage",
    "adapters_of",
    "embeddings_of",
    "experts_of",
]
