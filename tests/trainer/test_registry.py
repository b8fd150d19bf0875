"""``--optim elra`` as a name that Transformers knows."""

import copy

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames

import hf_elra
from hf_elra import ELRA, ElraTrainerMixin
from hf_elra.trainer.mixin import with_elra
from tests.conftest import arguments, llama, logged, token_rows, weights


def test_the_name_is_a_full_member_of_the_enumeration():
    member = OptimizerNames("elra")
    assert member == "elra"
    assert member is OptimizerNames.ELRA is OptimizerNames["ELRA"]
    assert list(OptimizerNames).count(member) == 1
    assert copy.deepcopy(member) is member


def test_registering_again_changes_nothing():
    before = (list(OptimizerNames), dict(_OPTIMIZER_HANDLERS), Trainer.__init__)
    hf_elra.register()
    assert (list(OptimizerNames), dict(_OPTIMIZER_HANDLERS), Trainer.__init__) == before


def test_command_lines_know_the_name(tmp_path):
    parser = HfArgumentParser(TrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--optim", "elra"])
    assert args.optim == "elra"
    with pytest.raises(ValueError, match="not a valid OptimizerNames"):
        TrainingArguments(str(tmp_path), optim="erla")


def test_stock_trainer_becomes_loss_aware(tmp_path):
    run = Trainer(llama(), arguments(tmp_path, TrainingArguments, optim="elra"), train_dataset=token_rows())
    assert isinstance(run, ElraTrainerMixin)
    assert type(run).__name__ == "Trainer"
    run.train()
    assert isinstance(run.elra_optimizer, ELRA)
    assert logged(run, "loss")[-1] < logged(run, "loss")[0]
    assert run.elra_optimizer.param_groups[0]["control"]["previous_loss"] is not None


def test_a_subclass_keeps_its_own_methods(tmp_path):
    class Doubled(Seq2SeqTrainer):
        def __init__(self, *args, extra, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = extra

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return 2 * loss

    from transformers import Seq2SeqTrainingArguments

    args = arguments(tmp_path, Seq2SeqTrainingArguments, optim="elra", max_steps=2)
    run = Doubled(llama(), args, train_dataset=token_rows(), extra=7)
    run.train()
    assert run.extra == 7
    assert isinstance(run, Doubled)
    assert logged(run, "loss")[0] > 7  # twice ln 64 or so
    memory = run.elra_optimizer.param_groups[0]["control"]["memory"]
    assert memory["initial_loss"] == pytest.approx(logged(run, "loss")[0], rel=1e-4)


def test_other_optimizers_keep_the_stock_trainer(tmp_path):
    args = arguments(tmp_path, TrainingArguments, optim="adamw_torch", max_steps=2)
    run = Trainer(llama(), args, train_dataset=token_rows())
    assert type(run) is Trainer
    assert args.max_grad_norm == 1.0
    run.train()
    assert isinstance(run.optimizer.optimizer, torch.optim.AdamW)


def test_the_upgraded_class_is_made_once():
    assert with_elra(Trainer) is with_elra(Trainer)
    assert with_elra(with_elra(Trainer)) is with_elra(Trainer)


def test_upgraded_and_explicit_trainers_walk_the_same_path(tmp_path):
    points = []
    for trainer_class in (Trainer, hf_elra.ElraTrainer):
        args = arguments(tmp_path, TrainingArguments, optim="elra", learning_rate=1e-3, max_steps=8)
        run = trainer_class(llama(), args, train_dataset=token_rows())
        run.train()
        points.append(weights(run.model))
    assert torch.equal(*points)
