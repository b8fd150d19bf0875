"""ELRA for Hugging Face Transformers: training without choosing a learning rate.

``import hf_elra`` is enough to register ``--optim elra`` with Transformers, and this package's image classifiers with
``AutoModel…``, so that saved ones load. Both happen when Transformers is imported, before this package or after it;
nothing here imports it. Names are looked up when they are used: ``from hf_elra.optim import ELRA`` needs PyTorch alone.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from hf_elra.after_import import after_import
from hf_elra.errors import ConfigurationError

if TYPE_CHECKING:
    from hf_elra.optim import ELRA, ELRASpectral, WeightAverage, adapters_of, embeddings_of, experts_of, outputs_of
    from hf_elra.trainer import (
        ElraSeq2SeqTrainer,
        ElraSeq2SeqTrainingArguments,
        ElraTrainer,
        ElraTrainerMixin,
        ElraTrainingArguments,
        register,
    )

__version__ = "0.2.0"

__all__ = [
    "ELRA",
    "ConfigurationError",
    "ELRASpectral",
    "ElraSeq2SeqTrainer",
    "ElraSeq2SeqTrainingArguments",
    "ElraTrainer",
    "ElraTrainerMixin",
    "ElraTrainingArguments",
    "WeightAverage",
    "adapters_of",
    "embeddings_of",
    "experts_of",
    "outputs_of",
    "register",
]

_OPTIM = ("ELRA", "ELRASpectral", "WeightAverage", "adapters_of", "embeddings_of", "experts_of", "outputs_of")
_ROOMS = ("control", "optim", "trainer")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"hf_elra.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'hf_elra' has no attribute {name!r}")
    value = getattr(importlib.import_module("hf_elra.optim" if name in _OPTIM else "hf_elra.trainer"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})


def _import(module: str, what: str) -> None:
    """Import a module that registers something; an error must not break the import of Transformers that led here."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        warnings.warn(f"hf_elra cannot register {what}: {error}", stacklevel=2)


after_import("transformers.training_args", lambda: _import("hf_elra.trainer", "--optim elra"))
after_import(
    "transformers.models.auto.configuration_auto",
    lambda: _import("hf_elra.recipes.image_models", "its image classifiers"),
)
