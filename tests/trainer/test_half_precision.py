"""fp16 with a loss scaler, as Accelerate has it on a GPU, on a CPU; what is refused is in test_arguments.py.

Accelerate takes fp16 on a GPU alone. Here its parts are put in place by hand: torch's GradScaler, for the CPU, and
autocast to float16.
"""

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.conftest import logged, trainer, weights
from tests.trainer.test_backward import high_at


@pytest.fixture
def half(monkeypatch):
    """Make a Trainer compute in half precision, with a scaler."""

    def make(run, **scaler):
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
        run.accelerator.native_amp, run.accelerator.scaler = True, torch.amp.GradScaler("cpu", **scaler)
        return run

    return make


@pytest.mark.parametrize("optim", ["elra", "elra_spectral", "hypergradient_adamw"])
def test_it_learns_as_in_single_precision(tmp_path, half, optim):
    losses = []
    for run in (trainer(tmp_path / "32", optim=optim), half(trainer(tmp_path / "16", optim=optim))):
        run.train()
        losses.append(logged(run, "loss"))
    assert run.accelerator.scaler.get_scale() == 2**16
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


def test_updates_that_overflow_are_not_made(tmp_path, half):
    """From a scale that is too large, which is halved until gradients fit."""
    run = half(trainer(tmp_path, max_steps=14), init_scale=2.0**24)
    before = weights(run.model)
    run.train()
    scale = run.accelerator.scaler.get_scale()
    skipped = 24 - int(torch.tensor(scale).log2())
    assert 2 <= skipped < 14
    assert run.elra_optimizer.param_groups[0]["scalars"]["updates"] == 14 - skipped
    assert run.elra_optimizer.restarts == 0
    assert not torch.equal(weights(run.model), before)
    assert logged(run, "loss")[-1] < logged(run, "loss")[0]


def test_a_pass_back_is_not_left_out(tmp_path, half):
    """The scaler wants gradients to look at. Here they overflow; the loss takes the last step back all the same."""
    run = half(trainer(tmp_path, max_steps=16, elra_batch_control="off", compute_loss_func=high_at(14)))
    run.train()
    assert run.elra_optimizer.restarts == 1
    assert run.elra_optimizer.metrics["non_finite"] == 0
    assert run.accelerator.scaler.get_scale() == 2**15
    assert run.elra.trials.counts.backwards == 16


def test_a_stock_optimizer_with_guards_takes_it_with_clipping(tmp_path, half):
    run = half(trainer(tmp_path, optim="adamw_torch", elra_soft_restart=True, max_grad_norm=0.1, max_steps=4))
    run.train()
    assert logged(run, "loss")[-1] < logged(run, "loss")[0]
    assert run.elra_optimizer.metrics["grad_norm"] == pytest.approx(0.1, rel=1e-3)
