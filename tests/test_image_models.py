"""The paper's networks: sizes, saving and loading, shapes."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_elra import ConfigurationError
from hf_elra.recipes.image_models import ARCHITECTURES, SmallImageClassifier, SmallImageClassifierConfig


def build(architecture, size, channels, classes):
    torch.manual_seed(0)
    return SmallImageClassifier(
        SmallImageClassifierConfig(
            architecture=architecture, image_size=size, num_channels=channels, num_labels=classes
        )
    )


@pytest.mark.parametrize(
    ("architecture", "size", "channels", "parameters"),
    [
        ("mnist-mlp", 28, 1, 7_960),
        ("fashion-cnn", 28, 1, 104_426),
        ("resnet20", 32, 3, 272_474),
        ("resnet18", 32, 3, 11_173_962),  # the usual counts of these networks for ten classes
        ("resnet34", 32, 3, 21_282_122),
        ("wrn-28-10", 32, 3, 36_479_194),
    ],
)
def test_numbers_of_parameters(architecture, size, channels, parameters):
    with torch.device("meta"):
        network = ARCHITECTURES[architecture](channels, size, 10)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("architecture", ["mnist-mlp", "fashion-cnn", "resnet18"])
def test_models_save_and_load(tmp_path, architecture):
    model = build(architecture, 16, 3, 5).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(model(images).logits, loaded(images).logits)
    assert model(images).logits.shape == (2, 5)
    assert model(images, labels=torch.tensor([0, 4])).loss.dim() == 0


def test_initial_weights_are_pytorchs_own():
    torch.manual_seed(0)
    plain = ARCHITECTURES["mnist-mlp"](1, 8, 10)
    for one, other in zip(plain.parameters(), build("mnist-mlp", 8, 1, 10).parameters(), strict=True):
        assert torch.equal(one, other)


def test_unknown_architecture_and_tiny_images_are_refused():
    with pytest.raises(ConfigurationError, match="'resnet8' is unknown. Did you mean 'resnet18'"):
        build("resnet8", 32, 3, 10)
    with pytest.raises(ConfigurationError, match="image_size=4 must be at least 8"):
        build("mnist-mlp", 4, 1, 10)
