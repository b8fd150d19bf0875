"""Optimizers for bare PyTorch loops; nothing in here knows Hugging Face."""

from hf_elra.optim.directions import stacks_of, tables_of
from hf_elra.optim.elra import ELRA
from hf_elra.optim.loss_aware import LossAwareOptimizer
from hf_elra.optim.point_mean import PointMean
from hf_elra.optim.spectral import ELRASpectral

__all__ = ["ELRA", "ELRASpectral", "LossAwareOptimizer", "PointMean", "stacks_of", "tables_of"]
