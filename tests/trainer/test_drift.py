"""How far a training moved its model, in the logs."""

import gc
import weakref

import pytest
import torch
from torch import nn

from hf_elra.trainer.drift import Drift
from tests.conftest import classifier, logged, token_rows, trainer


def test_the_distance_is_that_of_all_weights(tmp_path):
    run = trainer(tmp_path, optim="elra_spectral", max_steps=6, elra_boost_mean="off")
    before = [p.detach().clone() for p in run.model.parameters() if p.dim() > 1]
    run.train()
    after = [p.detach() for p in run.model.parameters() if p.dim() > 1]
    moved = sum((new - old).square().sum() for new, old in zip(after, before, strict=True))
    size = sum(old.square().sum() for old in before)
    found = logged(run, "drift")
    assert found == sorted(found)
    assert len(found) == 6
    assert found[-1] == pytest.approx((moved / size).sqrt().item(), rel=0.05)


def test_a_resumed_run_counts_from_where_the_whole_began(tmp_path):
    settings = dict(optim="elra_spectral", save_strategy="steps", save_steps=3)
    whole = trainer(tmp_path / "whole", max_steps=6, **settings)
    whole.train()
    trainer(tmp_path / "parts", max_steps=3, **settings).train()
    second = trainer(tmp_path / "parts", max_steps=6, **settings)
    second.train(resume_from_checkpoint=True)
    assert logged(second, "drift")[-1] == pytest.approx(logged(whole, "drift")[-1], rel=1e-3)


def test_of_lora_it_is_the_product():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
    model = peft.get_peft_model(classifier(), config)
    layers = [m for m in model.modules() if hasattr(m, "base_layer") and hasattr(m, "lora_A")]
    drift = Drift()
    drift.begin(model)
    assert drift.measure(model) == 0
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
    moved = sum(layer.get_delta_weight("default").square().sum() for layer in layers)
    size = sum(layer.base_layer.weight.square().sum() for layer in layers)
    assert drift.measure(model) == pytest.approx((moved / size).sqrt().item(), rel=1e-4)


def test_parameters_that_are_replaced_are_found_and_not_kept_alive():
    """As FSDP2 replaces them by their parts, whose distance is not known."""
    model, drift = nn.Linear(8, 8), Drift()
    drift.begin(model)
    old = weakref.ref(model.weight)
    model.weight = nn.Parameter(2 * model.weight.detach())
    gc.collect()
    assert old() is None
    assert drift.measure(model) == pytest.approx(1)
    model.weight = nn.Parameter(torch.empty(0, 8))
    assert drift.measure(model) is None


def test_it_is_logged_only_where_something_of_ours_is_in_use(tmp_path):
    run = trainer(tmp_path, optim="adamw_torch", max_steps=2, rows=token_rows(8))
    run.train()
    assert logged(run, "drift") == []
