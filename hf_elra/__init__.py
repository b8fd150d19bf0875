"""ELRA for Hugging Face Transformers: training without choosing a learning rate.

Importing this package registers ``--optim elra`` with Transformers, and its image classifiers with ``AutoModel…``, so
that saved ones load; nothing else changes.
"""

import hf_elra.recipes.image_models  # noqa: F401 - registers the models
from hf_elra.errors import ConfigurationError
from hf_elra.optim import ELRA, ELRASpectral, WeightAverage, embeddings_of, experts_of
from hf_elra.trainer import (
    ElraSeq2SeqTrainer,
    ElraSeq2SeqTrainingArguments,
    ElraTrainer,
    ElraTrainerMixin,
    ElraTrainingArguments,
    register,
)

__version__ = "0.1.0"

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
    "embeddings_of",
    "experts_of",
    "register",
]

register()
