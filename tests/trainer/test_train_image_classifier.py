"""``hf-elra classify-images`` and scripts/train_image_classifier.py from end to end, as a user starts them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ResNetConfig

from hf_elra import ConfigurationError
from hf_elra.recipes.image_classifier import ImageClassifierArguments, build_model, use_normalisation_of
from hf_elra.recipes.image_data import load_images
from hf_elra.recipes.image_models import SmallImageProcessor
from tests.conftest import finish


def test_digits_are_learned_and_the_saved_model_is_the_mean(tmp_path):
    folder = tmp_path / "run"
    words = ["--output_dir", str(folder), "--num_train_epochs", "4", "--elra_boost_every", "2", "--use_cpu"]
    code, output, error = finish("train_image_classifier.py", *words)
    assert code == 0, error
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test_accuracy"] > 0.7
    assert metrics["images_seen"] <= 4 * 1437
    assert f"test accuracy {100 * metrics['test_accuracy']:.2f} %" in output
    assert "| accuracy |" in output

    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    test = load_images("digits").test
    with torch.no_grad():
        logits = model(test.__getitems__(range(len(test)))["pixel_values"]).logits
    accuracy = (logits.argmax(1) == test.labels).double().mean().item()
    assert accuracy == pytest.approx(metrics["test_accuracy"])

    processor = SmallImageProcessor.from_pretrained(folder)  # what a user feeds it from pictures
    pictures = [Image.fromarray(image.numpy()) for image in test.images[:4, 0]]
    torch.testing.assert_close(processor(pictures)["pixel_values"], test.__getitems__(range(4))["pixel_values"])

    code, _, error = finish("train_image_classifier.py", *words)
    assert code == 2
    assert "holds a finished run; pass --overwrite" in error


def test_own_images_and_a_stock_optimizer(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(64) % 4
    np.savez(
        tmp_path / "mine.npz", train_images=pixels, train_labels=labels, test_images=pixels[:8], test_labels=labels[:8]
    )
    code, output, error = finish(
        "train_image_classifier.py",
        *("--dataset", "mine.npz", "--model", "fashion-cnn", "--augmentation", "flip+crop", "--optim", "adamw_torch"),
        *("--num_train_epochs", "2", "--per_device_train_batch_size", "16", "--output_dir", "out", "--use_cpu"),
        folder=tmp_path,
    )
    assert code == 0, error
    assert "64 training and 8 test images of 4 classes" in output
    settings = json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]
    assert (settings["learning_rate"], settings["elra_boost"]) == (1e-3, False)


def write_folder_of_images(path, size=40):
    generator = np.random.default_rng(0)
    for split, number in (("train", 24), ("test", 4)):
        for name in ("cat", "dog"):
            folder = path / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = generator.integers(0, 256, (size, size + 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.mark.parametrize(
    ("preset", "words", "network", "first"),
    [
        ("tiny-imagenet", ["--crop_size", "32"], "resnet18-imagenet: 11,177,538", 3),
        ("imagenet", ["--elra_control_cycle", "0.75ep"], "resnet50-imagenet: 23,512,130", 4),
    ],
)
def test_recipes_for_large_images_start_on_a_small_folder(tmp_path, preset, words, network, first):
    write_folder_of_images(tmp_path / "images")
    code, output, error = finish(
        "train_image_classifier.py",
        *("--preset", preset, "--dataset", "images", "--image_size", "40", *words),
        *("--per_device_train_batch_size", "8", "--num_train_epochs", "1", "--dataloader_num_workers", "2"),
        *("--output_dir", "out", "--use_cpu"),
        folder=tmp_path,
    )
    assert code == 0, error
    assert f"{network} parameters; images: 48 training and 8 test images of 2 classes" in output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["updates"] == 48 // (8 * first)
    assert metrics["settings"]["elra_initial_accumulation"] == first
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.id2label == {0: "cat", 1: "dog"}


def test_broken_and_missing_images_are_named(tmp_path):
    write_folder_of_images(tmp_path / "images")
    (tmp_path / "images" / "train" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(ConfigurationError, match=r"an image cannot be read, remove or replace it: .*0\.png"):
        load_images(str(tmp_path / "images"), image_size=32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="holds no images that can be read"):
        load_images(str(tmp_path / "empty"))


def test_the_saved_model_is_the_one_that_was_reported(tmp_path):
    """With the best model loaded at the end, the numbers are that one's."""
    folder = tmp_path / "run"
    words = ["--optim", "sgd", "--num_train_epochs", "3", "--load_best_model_at_end", "true", "--use_cpu"]
    words += ["--metric_for_best_model", "eval_accuracy", "--output_dir", str(folder), "--learning_rate", "1"]
    code, _, error = finish("train_image_classifier.py", *words)
    assert code == 0, error
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    test = load_images("digits").test
    with torch.no_grad():
        logits = model(test.__getitems__(range(len(test)))["pixel_values"]).logits
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test_accuracy"] == pytest.approx((logits.argmax(1) == test.labels).double().mean().item())
    assert metrics["test_accuracy"] == metrics["best_test_accuracy"]


def test_a_pretrained_model_gets_images_as_it_knows_them(tmp_path):
    """Colour and normalisation of the model's own processor; a head for these classes."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "model")
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    recipe = ImageClassifierArguments(model=str(tmp_path / "model"))
    data = load_images("digits")
    plain = data.test.images[:2].float() / 255
    model = build_model(recipe, data)
    use_normalisation_of(recipe, model, data)
    pixels = data.test.__getitems__([0, 1])["pixel_values"]
    for channel, (mean, std) in enumerate(zip(*processor.values(), strict=True)):
        torch.testing.assert_close(pixels[:, channel], (plain[:, 0] - mean) / std)
    assert model(pixel_values=pixels).logits.shape == (2, 10)


def test_a_model_without_a_processor_gets_the_channels_it_takes(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    model = AutoModelForImageClassification.from_config(config)
    model.save_pretrained(tmp_path)
    recipe, data = ImageClassifierArguments(model=str(tmp_path)), load_images("digits")
    plain = data.test.__getitems__([0, 1])["pixel_values"]
    use_normalisation_of(recipe, model, data)
    assert torch.equal(data.test.__getitems__([0, 1])["pixel_values"], plain.repeat(1, 3, 1, 1))
    model.config.num_channels = 1
    with pytest.raises(ConfigurationError, match=r"takes 1 channel\(s\), not the 3 of digits"):
        use_normalisation_of(recipe, model, data)
    model.config.pretrained_cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.25]}  # as timm writes it
    use_normalisation_of(recipe, model, data)
    assert data.train.std.flatten().tolist() == [0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--crop_size", "20"], "crop_size=20 must be between 1 and the 8 pixels of the images"),
        (["--weight_decay", "3"], "weight_decay=3.0 must be a number in [0, 1)"),
        (["--num_train_epochs", "-1"], "num_train_epochs=-1.0 must be above 0"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0 must be at least 1"),
        (["--resume_from_checkpoint", "x"], "pass --resume to go on from the last checkpoint"),
        (["--load_best_model_at_end", "true", "--eval_strategy", "no"], "load_best_model_at_end"),
        (["--preset", "mnits"], "--preset mnits is unknown. Did you mean 'mnist'"),
        (["--model", "resnet81"], "model='resnet81' is none of"),
        (["--dataset", "./nowhere"], "dataset='./nowhere' does not exist"),
        (["--dataset", "photos/"], "dataset='photos/' does not exist; give a folder"),
        (["--image_size", "4"], "image_size=4 must be at least 8"),
    ],
)
def test_wrong_input_is_one_line_exit_code_2_and_leaves_nothing(tmp_path, command_here, words, message):
    code, output, error = command_here("classify-images", "--output_dir", str(tmp_path / "run"), *words)
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
    assert output == ""
