"""``--optim elra`` as a name that Transformers knows."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers.integrations
from transformers import HfArgumentParser, Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.trainer_utils import HPSearchBackend
from transformers.training_args import OptimizerNames

import hf_elra
from hf_elra import ELRA, ELRASpectral, ElraTrainerMixin
from hf_elra.trainer.mixin import with_elra
from tests.conftest import ROOT, arguments, llama, logged, token_rows, weights


def test_the_name_is_a_full_member_of_the_enumeration():
    member = OptimizerNames("elra")
    assert member == "elra"
    assert member is OptimizerNames.ELRA is OptimizerNames["ELRA"]
    assert list(OptimizerNames).count(member) == 1
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member


def test_saved_arguments_are_read_where_nobody_imported_this_package(tmp_path):
    torch.save(arguments(tmp_path, TrainingArguments, optim="elra_spectral"), tmp_path / "training_args.bin")
    text = (
        f"import torch; args = torch.load({str(tmp_path / 'training_args.bin')!r}, weights_only=False); "
        "print(args.optim is type(args.optim)(args.optim.value), args.optim.value)"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.split() == ["True", "elra_spectral"], done.stderr


def test_registering_again_changes_nothing():
    before = (list(OptimizerNames), dict(_OPTIMIZER_HANDLERS), Trainer.__init__, Trainer.train)
    hf_elra.register()
    assert (list(OptimizerNames), dict(_OPTIMIZER_HANDLERS), Trainer.__init__, Trainer.train) == before


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
    assert run.elra_optimizer.param_groups[0]["scalars"]["previous_loss"] is not None


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
    memory = run.elra_optimizer.param_groups[0]["scalars"]["loss_statistics"]
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


class OwnTrain(Trainer):
    """Does something before it trains, once."""

    calls = 0

    def train(self, *args, **kwargs):
        self.calls += 1
        return super().train(*args, **kwargs)


@pytest.mark.parametrize("optim", ["elra", "elra_spectral"])
def test_a_name_that_comes_after_the_trainer_installs_all_of_it(tmp_path, optim):
    """As setfit's arguments, which are made by it; the same path as one that was named before."""
    first = arguments(tmp_path, TrainingArguments, optim=optim, max_steps=14, learning_rate=1e-3)
    early = Trainer(llama(), first, train_dataset=token_rows())
    late = OwnTrain(
        llama(), arguments(tmp_path, TrainingArguments, max_steps=14, learning_rate=1e-3), train_dataset=token_rows()
    )
    assert type(late) is OwnTrain
    late.args.optim = optim
    for run in (early, late):
        run.train()
        assert isinstance(run, ElraTrainerMixin)
    assert late.calls == 1
    assert torch.equal(weights(early.model), weights(late.model))
    assert logged(early, "alpha") == logged(late, "alpha")
    assert late.elra_callback.samples == 14 * 8


def test_wrong_settings_that_come_after_the_trainer_install_nothing(tmp_path):
    run = Trainer(llama(), arguments(tmp_path, TrainingArguments, max_steps=2), train_dataset=token_rows())
    run.args.optim, run.args.optim_args = "elra", "c=2"
    with pytest.raises(hf_elra.ConfigurationError, match="'c' is not an argument of ELRA"):
        run.train()
    assert type(run) is Trainer
    run.args.optim, run.args.optim_args = "adamw_torch", None
    run.train()
    assert isinstance(run.optimizer.optimizer, torch.optim.AdamW)


def test_what_is_changed_between_trainings_counts(tmp_path):
    run = Trainer(
        model_init=lambda: llama(), args=arguments(tmp_path, TrainingArguments, optim="elra_spectral", max_steps=12),
        train_dataset=token_rows(),
    )  # fmt: skip
    run.train()
    assert run.weight_average is not None
    run.args.optim, run.args.max_steps = "adamw_torch", 2
    run.train()
    assert not run.elra_active
    assert run.weight_average is None  # or evaluate would show the points of the training before
    stock = Trainer(
        model_init=lambda: llama(), args=arguments(tmp_path, TrainingArguments, max_steps=2), train_dataset=token_rows()
    )
    stock.train()
    torch.testing.assert_close(weights(run.model), weights(stock.model), rtol=1e-6, atol=1e-7)
    run.args.optim, run.train_dataset = "elra", token_rows(40)
    run.train()
    assert isinstance(run.elra_optimizer, ELRA)
    assert run.batch_control is not None


def test_an_optimizer_that_was_passed_in_goes_before_the_name(tmp_path):
    model, args = llama(), arguments(tmp_path, TrainingArguments, optim="elra", max_steps=2)
    run = Trainer(
        model, args, train_dataset=token_rows(), optimizers=(torch.optim.AdamW(model.parameters(), lr=1e-3), None)
    )
    assert type(run) is Trainer
    run.train()
    assert isinstance(run.optimizer.optimizer, torch.optim.AdamW)


def test_a_search_over_optimizers_that_began_with_another(tmp_path, monkeypatch):
    for module in (transformers.integrations, transformers.integrations.integration_utils):
        monkeypatch.setattr(module, "hp_params", lambda trial: trial.params)
    args = arguments(tmp_path, TrainingArguments, max_steps=14, learning_rate=1e-3)
    run = Trainer(model_init=lambda: llama(), args=args, train_dataset=token_rows())
    run.hp_search_backend, run.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    for number, (optim, kind) in enumerate(
        [("adamw_torch", torch.optim.AdamW), ("elra_spectral", ELRASpectral), ("elra", ELRA), ("sgd", torch.optim.SGD)]
    ):
        run.train(trial=type("Trial", (), {"number": number, "params": {"optim": optim}})())
        assert type(run.optimizer.optimizer) is kind
        assert isinstance(run, ElraTrainerMixin) == (number > 0)
        alone = Trainer(
            model_init=lambda: llama(), train_dataset=token_rows(),
            args=arguments(tmp_path, TrainingArguments, max_steps=14, learning_rate=1e-3, optim=optim),
        )  # fmt: skip
        alone.train()
        assert torch.equal(weights(run.model), weights(alone.model))
        assert logged(run, "loss") == logged(alone, "loss")
    assert (args.max_grad_norm, args.lr_scheduler_type) == (1.0, "linear")


def test_a_trainer_that_makes_another_optimizer_than_is_named_is_refused(tmp_path):
    class MakesItsOwn(Trainer):
        def create_optimizer(self, *args, **kwargs):
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
            return self.optimizer

    run = MakesItsOwn(llama(), arguments(tmp_path, TrainingArguments, optim="elra"), train_dataset=token_rows())
    with pytest.raises(hf_elra.ConfigurationError, match="optim=elra is not what MakesItsOwn.create_optimizer makes"):
        run.train()


def test_an_optimizer_that_is_set_after_the_trainer_was_made(tmp_path):
    model = llama()
    run = Trainer(model, arguments(tmp_path, TrainingArguments, max_steps=3), train_dataset=token_rows())
    run.optimizer = ELRA(model.parameters(), min_step_norm=0.1)
    run.train()
    assert isinstance(run, ElraTrainerMixin)
    assert len(logged(run, "alpha")) == 3
    assert run.elra_optimizer.param_groups[0]["scalars"]["previous_loss"] is not None
