"""hf_elra.trainer.backward: no pass back for an update that takes the last step back."""

import pytest
import torch

from hf_elra.optim import ELRA, OPTIMIZERS
from tests.conftest import trainer, weights


def high_at(*calls):
    """The mean loss of tokens, a thousand times as high at some calls."""
    number = [0]

    def compute_loss(outputs, labels, num_items_in_batch=None):
        number[0] += 1
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return loss * (1000.0 if number[0] in calls else 1.0)

    return compute_loss


@pytest.mark.parametrize("optim", ["elra", "elra_spectral"])
def test_it_is_left_out_and_nothing_else_changes(tmp_path, optim, monkeypatch):
    ends = []
    for asks in (True, False):
        if not asks:
            monkeypatch.setattr(OPTIMIZERS[optim], "asks_before_backward", False)
        run = trainer(tmp_path / str(asks), optim=optim, max_steps=20, elra_batch_control="off",
                      compute_loss_func=high_at(14, 15, 18))  # fmt: skip
        run.train()
        counts = run.elra.trials.counts
        assert run.elra_optimizer.restarts == 3
        assert (counts.forwards, counts.backwards) == (20, 17 if asks else 20)
        assert "backward" not in vars(run.accelerator)
        ends.append((weights(run.model), [entry.get("loss") for entry in run.state.log_history]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_an_update_of_several_passes_has_them_all(tmp_path):
    run = trainer(tmp_path, max_steps=12, gradient_accumulation_steps=2, compute_loss_func=high_at(19, 20))
    run.train()
    assert run.elra_optimizer.restarts == 1
    assert run.elra.trials.counts.backwards == 24


def test_it_can_be_asked_in_a_bare_loop():
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = ELRA([x], lr=0.1)
    for loss in (1.0, 0.9):
        assert not optimizer.takes_back(1e9 if loss == 1.0 else loss)  # nothing is known of losses at first
        x.grad = torch.ones(3)
        optimizer.step(loss=loss)
    state = optimizer.state_dict()["param_groups"][0]["scalars"]
    before = repr(state)
    assert optimizer.takes_back(100.0)
    assert not optimizer.takes_back(0.8)
    assert not optimizer.takes_back(float("nan"))  # its gradients say whether there is information in it
    assert repr(state) == before
    optimizer.zero_grad()
    point = x.detach().clone()
    optimizer.step(loss=100.0)
    assert optimizer.restarts == 1
    assert not torch.equal(x, point)
