"""The loops that README and docstrings show: they run, and tell the optimizer all that it has to know."""

import doctest
import re

import pytest
import torch

from hf_elra import ELRA, ELRASpectral, embeddings_of
from tests.conftest import ROOT

LOOPS = {
    f"README {number}": text
    for number, text in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S))
    if "optimizer.step(" in text
}
for optimizer_class in (ELRA, ELRASpectral):
    examples = doctest.DocTestParser().get_examples(optimizer_class.__doc__)
    LOOPS[optimizer_class.__name__] = "".join(example.source for example in examples)


class Model(torch.nn.Linear):
    def save_pretrained(self, folder):
        self.saved_in = folder


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_that_is_shown_ends_its_cycles_and_learns(loop, monkeypatch):
    ended, evaluated = [], []
    for kind in (ELRA, ELRASpectral):
        end = kind.end_cycle
        monkeypatch.setattr(kind, "end_cycle", lambda self, end=end: (ended.append(self), end(self)))
    torch.manual_seed(0)
    model, inputs, epochs = Model(4, 3), torch.randn(8, 4) + 0.1 * torch.randn(6, 8, 4), 20
    batches = [(x, x[:, :3]) for x in inputs]

    @torch.no_grad()
    def loss():
        return float(torch.nn.functional.mse_loss(model(inputs), inputs[..., :3]))

    start = loss()
    names = {
        "model": model, "epochs": epochs, "batches": batches, "loss_function": torch.nn.functional.mse_loss,
        "evaluate": evaluated.append, "embeddings_of": embeddings_of, "ELRA": ELRA, "ELRASpectral": ELRASpectral,
    }  # fmt: skip
    exec(LOOPS[loop], names)
    assert ended == [names["optimizer"]] * epochs
    assert loss() < 0.8 * start
    assert evaluated == ([model] if "WeightAverage" in LOOPS[loop] else [])


def test_all_loops_are_found():
    assert list(LOOPS) == ["README 1", "README 2", "ELRA", "ELRASpectral"]
