"""Image classification: presets by data set (the paper's section 4.2), the model, and what goes with each optimizer.

Networks are in ``image_models.py``, images in ``image_data.py``; the run itself is
``train_image_classifier.py``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_elra.errors import ConfigurationError, nearest
from hf_elra.recipes.command_line import choose, choose_optimizer, parse, value_of
from hf_elra.recipes.image_data import AUGMENTATIONS, DIGITS, ImageSplits
from hf_elra.recipes.image_models import (
    ARCHITECTURES,
    LARGE_IMAGES,
    SmallImageClassifier,
    SmallImageClassifierConfig,
    SmallImageProcessor,
)
from hf_elra.trainer import ElraTrainingArguments

# Network, augmentation, image size, first batch, control cycle and epochs of section 4.2; digits is ours.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"dataset": DIGITS, "model": "mnist-mlp", "num_train_epochs": 40},
    "mnist": {"dataset": "mnist", "model": "mnist-mlp", "num_train_epochs": 100},
    "fashion-mnist": {
        "dataset": "fashion_mnist",
        "model": "fashion-cnn",
        "augmentation": "flip",
        "num_train_epochs": 100,
    },
    "cifar10": {"dataset": "cifar10", "model": "resnet18", "augmentation": "flip+crop", "num_train_epochs": 100},
    "cifar100": {"dataset": "cifar100", "model": "resnet18", "augmentation": "flip+crop", "num_train_epochs": 100},
    "tiny-imagenet": {
        "dataset": "zh-plus/tiny-imagenet",
        "model": "resnet18-imagenet",
        "augmentation": "flip+crop",
        "image_size": 256,
        "crop_size": 224,
        "num_train_epochs": 100,
        "elra_initial_accumulation": 3,
    },
    "imagenet": {
        "dataset": "imagenet-1k",
        "model": "resnet50-imagenet",
        "augmentation": "flip+crop",
        "image_size": 256,
        "num_train_epochs": 50,
        "elra_initial_accumulation": 4,
        "elra_control_cycle": "0.25ep",
    },
}

# The paper runs these for comparison at a constant rate, with batches of 256 and no accumulation.
FAMILIES: dict[str, dict[str, Any]] = {
    "elra_spectral": {},
    "adam": {"learning_rate": 1e-3},
    "lion": {"learning_rate": 1e-4},
    "sgd": {
        "learning_rate": 0.1,
        "lr_scheduler_type": "cosine",
        "optim_args": "momentum=0.9,nesterov=True",
        "weight_decay": 5e-4,
        "per_device_train_batch_size": 128,
    },
}
OURS = (*ARCHITECTURES, *LARGE_IMAGES)
NOT_OF_THE_TRAJECTORY = {"resume", "overwrite"}


@dataclass
class ImageClassifierArguments:
    """What to classify, with which network, and what to do with the run; defaults come from the preset.

    Args:
        preset (str): one of ``digits``, ``mnist``, ``fashion-mnist``, ``cifar10``, ``cifar100``, ``tiny-imagenet``,
            ``imagenet``.
        dataset (str): ``digits`` (1,797 real images in this package), a local path (folder of idx files, of parquet
            files or of images by class; npz file) or a name on the hub.
        model (str): ``mnist-mlp``, ``fashion-cnn``, ``resnet20``, ``resnet18``, ``resnet34``, ``wrn-28-10``;
            ``resnet18-imagenet``, ``resnet50-imagenet`` (the usual networks for large images, untrained); or any image
            classifier of the hub or a folder, e.g. ``microsoft/resnet-50`` or, with timm installed,
            ``timm/resnet18.a1_in1k``.
        from_scratch (bool): take only the architecture of such a model, not its weights.
        image_size (int): resize the shorter side of images to it and cut out the middle; by default they stay as they
            are, and must be square and of one size.
        crop_size (int): cut this many pixels out of every image: at random with ``flip+crop``, in evaluation from the
            middle. Default: all.
        augmentation (str): ``none``, ``flip`` or ``flip+crop`` (reflect-padded by 4 pixels).
        resume (bool): go on from the last checkpoint of an interrupted run.
        overwrite (bool): replace the run in the output folder.
    """

    preset: str = field(default="digits", metadata={"help": f"One of {', '.join(PRESETS)}."})
    dataset: str = field(default=DIGITS, metadata={"help": "digits, a local path or a name on the hub."})
    model: str = field(default="mnist-mlp", metadata={"help": f"{', '.join(OURS)}, or a name on the hub."})
    from_scratch: bool = field(default=False, metadata={"help": "Only the architecture of a model by name."})
    image_size: int | None = field(default=None, metadata={"help": "Resize the shorter side, cut out the middle."})
    crop_size: int | None = field(default=None, metadata={"help": "Then cut out so many pixels."})
    augmentation: str = field(default="none", metadata={"help": "Of the training images.", "choices": AUGMENTATIONS})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in the output folder."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what is in the output folder."})

    def __post_init__(self) -> None:
        for name in ("image_size", "crop_size"):
            if getattr(self, name) is not None and getattr(self, name) < 8:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be at least 8.")


def parse_arguments(words: list[str]) -> tuple[ImageClassifierArguments, ElraTrainingArguments]:
    """Read the command line: preset, then the optimizer's own settings, then the flags given."""
    preset = choose("--preset", words, "digits", PRESETS)
    optim = choose_optimizer(words, "elra")
    source = value_of("--dataset", words, preset)
    output_dir = f"runs/{Path(source).resolve().stem or preset}" + ("" if optim == "elra" else f"-{optim}")
    return parse(ImageClassifierArguments, words, {"output_dir": output_dir, **defaults_of(preset, optim)})


def defaults_of(preset: str, optim: str) -> dict[str, Any]:
    """Return the values of the flags that are not given, for this preset and optimizer."""
    ours = optim == "elra"
    defaults: dict[str, Any] = {
        "report_to": ["none"],
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "logging_strategy": "epoch",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,  # the data set hands out whole batches
        "per_device_train_batch_size": 32 if ours else 256,
        "per_device_eval_batch_size": 500,
        "elra_initial_accumulation": 2,
        "elra_boost": ours,
        **PRESETS[preset],
    }
    if not ours:
        del defaults["elra_initial_accumulation"]
        defaults.pop("elra_control_cycle", None)
        family = next((f for f in FAMILIES if optim.startswith(f) or f"_{f}" in optim), "adam")
        defaults |= {"lr_scheduler_type": "constant", **FAMILIES[family]}
    return defaults


def build_model(recipe: ImageClassifierArguments, data: ImageSplits) -> Any:
    """Build the network for these images; the weights of an untrained one come from torch's global seed.

    Raises:
        ConfigurationError: the model is not known, here or on the hub.
    """
    names: dict[str, Any] = {
        "num_labels": len(data.classes),  # models of timm need it beside the names
        "id2label": dict(enumerate(data.classes)),
        "label2id": {name: i for i, name in enumerate(data.classes)},
    }
    if recipe.model in ARCHITECTURES:
        channels, _, size = data.train.shape
        return SmallImageClassifier(
            SmallImageClassifierConfig(architecture=recipe.model, image_size=size, num_channels=channels, **names)
        )
    from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig

    if recipe.model in LARGE_IMAGES:
        config = ResNetConfig(num_channels=data.train.channels, **LARGE_IMAGES[recipe.model], **names)
        return AutoModelForImageClassification.from_config(config)
    try:
        if recipe.from_scratch:
            config = AutoConfig.from_pretrained(recipe.model, **names)
            return AutoModelForImageClassification.from_config(config)
        return AutoModelForImageClassification.from_pretrained(recipe.model, ignore_mismatched_sizes=True, **names)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigurationError(
            f"model={recipe.model!r} is none of {', '.join(OURS)} and could not be loaded."
            f"{nearest(recipe.model, OURS)} {str(error).splitlines()[0]}"
        ) from error


def use_normalisation_of(recipe: ImageClassifierArguments, model: Any, data: ImageSplits) -> None:
    """Give a model of the hub images as it expects them: normalised by its own numbers, grey images as colour.

    The numbers are those of its image processor (``preprocessor_config.json``) or of timm (``pretrained_cfg``). If it
    has none, those of the images stay.

    Raises:
        ConfigurationError: the model takes fewer channels than the images have.
    """
    if recipe.model in OURS:
        return
    given = _image_processor(recipe.model) or getattr(model.config, "pretrained_cfg", None) or {}
    mean, std = (given.get(f"image_{name}", given.get(name)) for name in ("mean", "std"))
    wrapped = getattr(model.config, "model_type", None) == "timm_wrapper"
    channels = len(mean) if mean is not None else getattr(model.config, "num_channels", 3 if wrapped else None)
    for images in (data.train, data.test):
        if channels is not None and channels < images.channels:
            raise ConfigurationError(
                f"model={recipe.model!r} takes {channels} channel(s), not the {images.channels} of {data.name}."
            )
        images.channels = channels or images.channels
        if mean is not None and std is not None:
            device = images.mean.device
            images.mean, images.std = (torch.tensor(value, device=device).view(1, -1, 1, 1) for value in (mean, std))


def _image_processor(model_name: str) -> dict[str, Any] | None:
    from transformers.utils import cached_file

    try:
        path = cached_file(model_name, "preprocessor_config.json")
    except OSError:
        return None
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def build_processor(recipe: ImageClassifierArguments, data: ImageSplits) -> SmallImageProcessor:
    """Build the image processor that is saved with a model that is trained on these images."""
    mean, std = (values.flatten().tolist() for values in (data.train.mean, data.train.std))
    return SmallImageProcessor(mean, std, recipe.image_size, recipe.crop_size, data.train.channels)


def for_card(recipe: ImageClassifierArguments, data: ImageSplits, parameters: int) -> dict[str, Any]:
    """Return what the model card of a run has to say that its log does not.

    Args:
        recipe: of the run.
        data: the images.
        parameters: how many the model has.
    """
    known = {"data_licence": "CC BY 4.0", "licence": "mit"} if recipe.dataset == DIGITS else {}
    lossy = "The images are a JPEG-compressed copy: numbers are not comparable with those of the published data set."
    return {
        "title": Path(recipe.model).name if recipe.dataset != DIGITS else "digits",
        "task": "image-classification",
        "description": f"An image classifier ({Path(recipe.model).name}) of {parameters:,} parameters, trained with "
        "`hf_elra`.",
        "data": Path(data.name).name if Path(data.name).exists() else data.name,
        "more": {"images": f"{len(data.train):,} for training, {len(data.test):,} for testing"},
        **({"limits": lossy} if data.lossy_copy else {}),
        **known,
    }
