"""Image classifiers of the paper's section 4.2, and their image processor, as Transformers classes that save and load.

One configuration names the architecture and the shape of the images; importing this module registers it with
``AutoConfig`` and ``AutoModelForImageClassification``. The residual networks here have the stem for small images: a 3×3
convolution and no pooling; those for large images are Transformers' own. Models expect normalised
images of shape (batch, channels, height, width), which ``image_data.py`` makes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BatchFeature,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from hf_elra.errors import ConfigurationError, nearest


class SmallImageClassifierConfig(PretrainedConfig):
    """Architecture and image shape.

    Args:
        architecture (str): a key of :data:`ARCHITECTURES`.
        image_size (int): height and width in pixels.
        num_channels (int): 1 for grey, 3 for colour.
    """

    model_type = "hf_elra_image_classifier"

    def __init__(
        self, architecture: str = "mnist-mlp", image_size: int = 28, num_channels: int = 1, **kwargs: Any
    ) -> None:
        self.architecture = architecture
        self.image_size = image_size
        self.num_channels = num_channels
        super().__init__(**kwargs)


def mnist_mlp(channels: int, size: int, classes: int) -> nn.Module:
    """One hidden layer of 10 neurons: 784-10-10, 7,960 parameters on MNIST."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 10), nn.ReLU(), nn.Linear(10, classes))


def fashion_cnn(channels: int, size: int, classes: int) -> nn.Module:
    """Three convolutions (32, 64, 128 filters of 3×3), each with BatchNorm, ReLU and 2×2 max-pooling.

    The paper names a "3-layer convolutional network FashionCNN" and no sizes; these are ours.
    """

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]

    side = size // 8
    return nn.Sequential(
        *block(channels, 32), *block(32, 64), *block(64, 128), nn.Flatten(), nn.Linear(128 * side * side, classes)
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def resnet(blocks: tuple[int, ...], first: int = 64) -> Callable[[int, int, int], nn.Module]:
    """ResNet of basic blocks for small images; it has ``first`` filters, and twice as many from stage to stage."""

    def build(channels: int, size: int, classes: int) -> nn.Module:
        stem = nn.Conv2d(channels, first, 3, padding=1, bias=False)
        layers: list[nn.Module] = [stem, nn.BatchNorm2d(first), nn.ReLU()]
        width = first
        for stage, number in enumerate(blocks):
            for position in range(number):
                outputs, stride = first * 2**stage, 2 if stage and position == 0 else 1
                layers.append(BasicBlock(width, outputs, stride))
                width = outputs
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

    return build


class WideBlock(nn.Module):
    """Pre-activation block of a Wide ResNet (Zagoruyko and Komodakis 2017)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        active = torch.relu(self.norm1(x))
        inner = self.conv2(torch.relu(self.norm2(self.conv1(active))))
        return inner + (x if self.shortcut is None else self.shortcut(active))


def wide_resnet(depth: int, factor: int) -> Callable[[int, int, int], nn.Module]:
    """WRN-depth-factor: 16, 32 and 64 times ``factor`` filters."""

    def build(channels: int, size: int, classes: int) -> nn.Module:
        width = 16
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
        for stage in range(3):
            for position in range((depth - 4) // 6):
                outputs, stride = 16 * factor * 2**stage, 2 if stage and position == 0 else 1
                layers.append(WideBlock(width, outputs, stride))
                width = outputs
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
        return nn.Sequential(*layers)

    return build


ARCHITECTURES: dict[str, Callable[[int, int, int], nn.Module]] = {
    "mnist-mlp": mnist_mlp,
    "fashion-cnn": fashion_cnn,
    "resnet20": resnet((3, 3, 3), 16),
    "resnet18": resnet((2, 2, 2, 2)),
    "resnet34": resnet((3, 4, 6, 3)),
    "wrn-28-10": wide_resnet(28, 10),
}
"""Builders taking (channels, image size, classes)."""

LARGE_IMAGES: dict[str, dict[str, Any]] = {
    "resnet18-imagenet": {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
    "resnet50-imagenet": {"layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3]},
}
"""The residual networks for large images, with a 7×7 stem and pooling: arguments of Transformers' ``ResNetConfig``."""


class SmallImageClassifier(PreTrainedModel):
    """One of :data:`ARCHITECTURES` with a cross-entropy loss.

    Raises:
        ConfigurationError: the architecture is unknown or the images are too small for it.
    """

    config_class = SmallImageClassifierConfig
    main_input_name = "pixel_values"

    def __init__(self, config: SmallImageClassifierConfig) -> None:
        super().__init__(config)
        if config.architecture not in ARCHITECTURES:
            raise ConfigurationError(
                f"architecture={config.architecture!r} is unknown.{nearest(config.architecture, ARCHITECTURES)} "
                f"Choose from {', '.join(ARCHITECTURES)}."
            )
        if config.image_size < 8:
            raise ConfigurationError(f"image_size={config.image_size} must be at least 8.")
        self.network = ARCHITECTURES[config.architecture](
            config.num_channels, config.image_size, config.num_labels or 2
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave PyTorch's initialisation as it is; initialise only what was built on the meta device."""
        if hasattr(module, "reset_parameters") and any(p.is_meta for p in module.parameters(recurse=False)):
            reset: Any = module.reset_parameters
            reset()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutputWithNoAttention:
        """Classify images.

        Args:
            pixel_values: normalised images, shape (batch, channels, height, width).
            labels: class numbers, shape (batch,); with them the mean cross-entropy is returned as ``loss``.
        """
        logits = self.network(pixel_values)
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


AutoConfig.register(SmallImageClassifierConfig.model_type, SmallImageClassifierConfig, exist_ok=True)
AutoModelForImageClassification.register(SmallImageClassifierConfig, SmallImageClassifier, exist_ok=True)


class SmallImageProcessor(BaseImageProcessor):
    """Makes images of any kind into what a classifier was trained on; saved beside the model.

    Args:
        image_mean, image_std (list of float): mean and standard deviation of every channel, on the scale [0, 1].
        image_size (int, optional): resize the shorter side to it and cut out the middle; None leaves the size.
        crop_size (int, optional): then cut this many pixels out of the middle.
        num_channels (int): 1 for grey, 3 for colour.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - Transformers' name

    def __init__(
        self,
        image_mean: Any = (0.5,),
        image_std: Any = (0.5,),
        image_size: int | None = None,
        crop_size: int | None = None,
        num_channels: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.image_size, self.crop_size, self.num_channels = image_size, crop_size, num_channels

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """Same as :meth:`preprocess`."""
        return self.preprocess(images, *args, **kwargs)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """Return normalised ``pixel_values``, (number, channels, height, width).

        Args:
            images: a PIL image, or a list of them; uint8 arrays of shape (height, width[, channels]) work too.
            return_tensors: as in Transformers.
            kwargs: not used.
        """
        from PIL import Image

        images = images if isinstance(images, list | tuple) else [images]
        pixels = []
        for image in images:
            picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
            picture = with_8_bits(picture, colour=self.num_channels == 3)
            if self.image_size is not None:
                picture = shorter_side_to(picture, self.image_size)
            array = np.atleast_3d(np.asarray(picture, np.float32)).transpose(2, 0, 1) / 255
            if self.crop_size is not None:
                array = middle_crop(array, self.crop_size)
            mean, std = (
                np.asarray(values, np.float32).reshape(-1, 1, 1) for values in (self.image_mean, self.image_std)
            )
            pixels.append((array - mean) / std)
        return BatchFeature({"pixel_values": np.stack(pixels)}, tensor_type=return_tensors)


def with_8_bits(picture: Any, *, colour: bool) -> Any:
    """Return a PIL image as 8-bit colour or grey; grey values of 16 bits are scaled, while PIL would cut them off."""
    from PIL import Image

    if picture.mode.startswith("I"):  # 16 bits, or integers that may stand for 8 or for 16
        values = np.asarray(picture)
        if picture.mode != "I" or values.max() > 255:
            values = np.round(values / 257)
        picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return picture.convert("RGB" if colour else "L")


def middle_crop(pixels: Any, size: int) -> Any:
    """Cut ``size`` x ``size`` pixels out of the middle of arrays or tensors, (..., height, width)."""
    top, left = ((extent - size) // 2 for extent in pixels.shape[-2:])
    return pixels[..., top : top + size, left : left + size]


def shorter_side_to(picture: Any, size: int) -> Any:
    """Resize a PIL image's shorter side to ``size`` pixels and cut out the middle."""
    scale = size / min(picture.size)
    picture = picture.resize((max(size, round(picture.width * scale)), max(size, round(picture.height * scale))))
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


with contextlib.suppress(ImportError):  # the oldest Transformers offers this class only beside torchvision
    AutoImageProcessor.register(
        SmallImageClassifierConfig, image_processor_classes={"pil": SmallImageProcessor}, exist_ok=True
    )
