"""Optimizers for bare PyTorch loops; nothing in here knows Hugging Face."""

from hf_elra.optim.averaging import WeightAverage
from hf_elra.optim.base import LossAwareOptimizer
from hf_elra.optim.directions.spectral import embeddings_of, experts_of, outputs_of
from hf_elra.optim.elra import ELRA
from hf_elra.optim.elra_2023 import ELRAC2Min, ELRAP2Min
from hf_elra.optim.gols import GOLS
from hf_elra.optim.guarded import Guarded
from hf_elra.optim.hypergradient import HypergradientAdamW, HypergradientSGD
from hf_elra.optim.labpal import LABPALNSGD, LABPALSGD
from hf_elra.optim.natural_steps import adapters_of
from hf_elra.optim.ntlr import NTLR, NTLRSGD, NTLRAdamW
from hf_elra.optim.pal import PAL
from hf_elra.optim.pls import PLS
from hf_elra.optim.sls import SLS
from hf_elra.optim.spectral import ELRASpectral
from hf_elra.optim.sps import SPS

OPTIMIZERS: dict[str, type[LossAwareOptimizer]] = {
    "elra": ELRA,
    "elra_spectral": ELRASpectral,
    "elra_c2min": ELRAC2Min,
    "elra_p2min": ELRAP2Min,
    "ntlr_sgd": NTLRSGD,
    "ntlr_adamw": NTLRAdamW,
    "hypergradient_sgd": HypergradientSGD,
    "hypergradient_adamw": HypergradientAdamW,
    "sps": SPS,
    "pal": PAL,
    "sls": SLS,
    "labpal_sgd": LABPALSGD,
    "labpal_nsgd": LABPALNSGD,
    "gols": GOLS,
    "pls": PLS,
}
"""Optimizers by the names that ``--optim`` knows: a new one is a line here."""

__all__ = [
    "ELRA",
    "GOLS",
    "LABPALNSGD",
    "LABPALSGD",
    "NTLR",
    "NTLRSGD",
    "OPTIMIZERS",
    "PAL",
    "PLS",
    "SLS",
    "SPS",
    "ELRAC2Min",
    "ELRAP2Min",
    "ELRASpectral",
    "Guarded",
    "HypergradientAdamW",
    "HypergradientSGD",
    "LossAwareOptimizer",
    "NTLRAdamW",
    "WeightAverage",
    "adapters_of",
    "embeddings_of",
    "experts_of",
    "outputs_of",
]
