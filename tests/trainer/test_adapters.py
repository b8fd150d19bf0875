"""What PEFT makes of a model, in a Trainer: kinds of LoRA, and whole modules that are saved beside them."""

import math
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_elra import adapters_of
from tests.conftest import llama, logged, trainer

KINDS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "biases": {"bias": "all"},
    "embeddings by LoRA": {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    "embeddings saved": {"modules_to_save": ["embed_tokens"]},
    "output layer saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both saved as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


def with_adapters(model, **given):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **given}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*(tie_word_embeddings|no tied modules).*")
        return get_peft_model(model, LoraConfig(**settings))


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_found_and_trained(tmp_path, kind, is_tied):
    """A pair steps by what suits its product, a saved table by a small share of its size; nothing else moves."""
    model = with_adapters(llama(tie_word_embeddings=is_tied), **KINDS[kind])
    pairs = adapters_of(model)
    assert len(pairs) == (5 if kind == "embeddings by LoRA" else 4)
    assert all(factor == (4 if kind == "rsLoRA" else 2) for _, _, factor, _ in pairs)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(tmp_path, model=model, optim="elra_spectral", max_steps=30, elra_boost_mean="off")
    run.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert logged(run, "loss")[-1] < logged(run, "loss")[0]
    tables = [name for name in moved if "modules_to_save" in name]
    assert len(tables) == ("saved" in kind) + (kind == "both saved")
    for name in tables:
        walked = (model.get_parameter(name) - before[name]).norm() / before[name].norm()
        assert 1e-3 < walked < 30 * 0.004 / math.sqrt(50)


class Quantised(nn.Linear):
    """A layer whose weights are whole numbers, as those that are loaded in 8 bits."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        scale = layer.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, rows):
        return nn.functional.linear(rows, self.weight * self.scale)


def test_beside_whole_numbers(tmp_path):
    """The pairs are trained as beside any matrix; how far these walk is not known."""
    model = llama()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(parent, name, Quantised(child))
    model = with_adapters(model)
    assert len(adapters_of(model)) == 4
    run = trainer(tmp_path, model=model, optim="elra_spectral", max_steps=30)
    run.train()
    assert logged(run, "loss")[-1] < logged(run, "loss")[0]
    assert logged(run, "drift") == []
