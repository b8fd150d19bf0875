"""The glue between the optimizers and Hugging Face: arguments, Trainer, registry, launcher.

Importing it registers ``--optim elra``.
"""

from hf_elra.trainer.arguments import ElraSeq2SeqTrainingArguments, ElraSettings, ElraTrainingArguments
from hf_elra.trainer.mixin import ElraSeq2SeqTrainer, ElraTrainer, ElraTrainerMixin
from hf_elra.trainer.registry import register

__all__ = [
    "ElraSeq2SeqTrainer",
    "ElraSeq2SeqTrainingArguments",
    "ElraSettings",
    "ElraTrainer",
    "ElraTrainerMixin",
    "ElraTrainingArguments",
    "register",
]

register()
