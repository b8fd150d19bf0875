"""Images to classify: where they come from, and batches of them, augmented as in the paper's section 4.2.

Sources: ``digits`` (1,797 real images in this package), a name on the hub, or a local path: a folder of idx files
(MNIST's own format), an npz file, parquet files, or a folder of images by class. Images that fit into memory are kept
there as uint8. They are gathered, augmented and normalised as whole batches, on the device that trains if they fit
there too; no loader process is needed then. Other images stay encoded on disk and are decoded batch by batch, which
loader processes can do side by side. Models are in ``image_models.py``.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import gzip
import io
import logging
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from hf_elra.errors import ConfigurationError, needed_by_recipes
from hf_elra.recipes.image_models import middle_crop, shorter_side_to, with_8_bits

logger = logging.getLogger(__name__)

DIGITS = "digits"
CROP_PADDING = 4
AUGMENTATIONS = ("none", "flip", "flip+crop")

TEST_SPLITS = ("test", "validation", "valid")
SPLIT_WORDS = {"train": {"train", "training"}, "valid": {"valid", "val", "validation"}, "test": {"test", "testing"}}
GREY_MODES = ("L", "1", "I", "I;16", "I;16L", "I;16B", "I;16N")  # PIL's
MEMORY_SHARE = 0.5  # of what is free, which images may take
SAMPLED_IMAGES = 2000  # from which mean and standard deviation are taken where images stay encoded


@dataclass
class ImageSplits:
    """Training and test images.

    Attributes:
        name: where they come from, for reports.
        train, test: the images.
        classes: names of the classes.
        lossy_copy: whether they are a JPEG-compressed copy in an npz file, not the data set as it is published.
    """

    name: str
    train: ImageDataset
    test: ImageDataset
    classes: list[str]
    lossy_copy: bool = False


class EncodedImages:
    """Images that stay encoded on disk; indexing with row numbers decodes these rows, as a uint8 tensor.

    Args:
        rows: a ``datasets.Dataset``.
        name: name of its image column.
        decode: turns a PIL image into a uint8 array of shape (height, width) or (height, width, channels).
        shape: (number, channels, height, width).
    """

    device = torch.device("cpu")
    dtype = torch.uint8

    def __init__(
        self, rows: Any, name: str, decode: Callable[[Any], np.ndarray], shape: tuple[int, int, int, int]
    ) -> None:
        self.rows, self.name, self.decode, self.shape = rows, name, decode, shape

    def dim(self) -> int:
        """Four: number, channels, height, width."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        with naming_broken_images():
            return self._decode_all(self.rows[rows.tolist()][self.name], len(rows))

    def decoded(self, what: str) -> Tensor:
        """Return all images; a progress bar called ``what`` is shown where that takes long."""
        with naming_broken_images():
            return self._decode_all(tqdm(self.rows[self.name], what, delay=5), len(self))

    def _decode_all(self, pictures: Iterable[Any], number: int) -> Tensor:
        images = torch.empty((number, *self.shape[1:]), dtype=torch.uint8)
        for position, picture in enumerate(pictures):
            array = np.atleast_3d(self.decode(picture))
            if array.shape[:2] != self.shape[2:]:
                raise ConfigurationError("the images differ in size; give --image_size.")
            images[position] = torch.from_numpy(array.transpose(2, 0, 1).copy())
        return images


@contextlib.contextmanager
def naming_broken_images() -> Iterator[None]:
    """Turn an exception of reading an image file into an error that names the file."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"an image cannot be read, remove or replace it: {error}") from error


class ImageDataset(Dataset):
    """Images, handed out as batches ready for the model.

    A loader that asks for several rows at once (PyTorch's does, through ``__getitems__``) gets one batch, a dict of
    ``pixel_values`` (float, normalised, (batch, channels, height, width)) and ``labels``; the collator is
    :func:`as_batch`. Augmentation is random by ``seed`` and the rows of the batch, so that a resumed run sees the same.

    Args:
        images: uint8, (number, channels, height, width), in memory or encoded.
        labels: int64, (number,).
        augmentation: one of :data:`AUGMENTATIONS`.
        crop_size: cut this many pixels out of every image: at random with ``flip+crop``, else from the middle.
        mean, std: mean and standard deviation of every channel, in [0, 1]; by default those of ``images``.
        seed: seed of the augmentation.

    Attributes:
        channels: number of channels to hand out; grey images are repeated for a model that takes colour.
    """

    def __init__(
        self,
        images: Tensor | EncodedImages,
        labels: Tensor,
        *,
        augmentation: str = "none",
        crop_size: int | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        if augmentation not in AUGMENTATIONS:
            raise ConfigurationError(
                f"augmentation={augmentation!r} is unknown. Choose from {', '.join(AUGMENTATIONS)}."
            )
        if images.dim() != 4 or images.dtype != torch.uint8 or len(images) != len(labels):
            raise ConfigurationError(
                f"images must be uint8 of shape (number, channels, height, width) with as many labels, not "
                f"{images.dtype} {tuple(images.shape)} with {len(labels)} labels."
            )
        if crop_size is not None and not 0 < crop_size <= min(images.shape[-2:]):
            raise ConfigurationError(
                f"crop_size={crop_size} must be between 1 and the {min(images.shape[-2:])} pixels of the images; raise "
                "--image_size or lower it."
            )
        self.images: Any = images
        self.channels = images.shape[1]
        self.labels = labels.to(torch.int64)
        self.augmentation, self.crop_size, self.seed = augmentation, crop_size, seed
        if mean is None or std is None:
            mean, std = channel_statistics(images)
        self.mean, self.std = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def to(self, device: Any) -> ImageDataset:
        """Move the images to a device, where batches are then made; images that do not fit stay where they are."""
        device = torch.device(device)
        if isinstance(self.images, EncodedImages):
            return self
        if device.type == "cuda" and self.images.numel() > MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
            return self
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of the images that are handed out."""
        height, width = self.images.shape[2:] if self.crop_size is None else (self.crop_size, self.crop_size)
        return (self.channels, height, width)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one row, without the batch dimension."""
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the batch of these rows."""
        rows = torch.as_tensor(indices, device=self.images.device)
        pixels = self.images[rows].to(torch.float32)
        if pixels.shape[1] != self.channels:
            pixels = pixels.repeat(1, self.channels, 1, 1)
        pixels.sub_(255 * self.mean).div_(255 * self.std)
        if self.augmentation != "none":
            generator = torch.Generator().manual_seed(hash((self.seed, *map(int, indices))) & (2**63 - 1))
            pixels = augment(pixels, self.augmentation, generator, self.crop_size)
        if self.crop_size is not None:
            pixels = middle_crop(pixels, self.crop_size)
        return {"pixel_values": pixels.contiguous(), "labels": self.labels[rows]}


def as_batch(rows: Any) -> dict[str, Tensor]:
    """The collator of :class:`ImageDataset`: its batches are ready, and single rows are stacked."""
    if isinstance(rows, dict):
        return rows
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def augment(pixels: Tensor, how: str, generator: torch.Generator, crop_size: int | None = None) -> Tensor:
    """Flip every image left to right with probability one half; with ``flip+crop`` also cut it out at random.

    The crop is PyTorch's RandomCrop with 4 pixels of padding in reflect mode, here on normalised images; without
    ``crop_size`` it keeps the size, so that images are shifted by up to 4 pixels.

    Args:
        pixels: (batch, channels, height, width).
        how: ``"flip"`` or ``"flip+crop"``.
        generator: a CPU generator.
        crop_size: height and width of the crop.
    """
    number, _, *size = pixels.shape
    flips = torch.rand(number, generator=generator).lt(0.5).to(pixels.device)
    pixels = torch.where(flips.view(-1, 1, 1, 1), pixels.flip(3), pixels)
    if how == "flip+crop":
        padding = CROP_PADDING
        padded = torch.nn.functional.pad(pixels, (padding,) * 4, mode="reflect")
        height, width = size if crop_size is None else (crop_size, crop_size)
        top, left = (
            torch.randint(0, extent + 2 * padding - part + 1, (number,), generator=generator).to(pixels.device)
            for extent, part in zip(size, (height, width), strict=True)
        )
        rows = top.view(-1, 1) + torch.arange(height, device=pixels.device)
        columns = left.view(-1, 1) + torch.arange(width, device=pixels.device)
        image = torch.arange(number, device=pixels.device).view(-1, 1, 1)
        pixels = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return pixels.contiguous()


def channel_statistics(images: Any) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every channel of uint8 images, on the scale [0, 1].

    If images stay encoded, :data:`SAMPLED_IMAGES` of them, spread evenly, are looked at.
    """
    if isinstance(images, EncodedImages):
        images = images[torch.linspace(0, len(images) - 1, min(SAMPLED_IMAGES, len(images))).long()]
    channels = images.shape[1]
    counts = (
        torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(channels)]).cpu().double()
    )
    levels = torch.arange(256, dtype=torch.float64) / 255  # on the host, as Apple's MPS has no float64
    shares = counts / counts.sum(1, keepdim=True)
    mean = shares @ levels
    std = ((levels - mean[:, None]).square() * shares).sum(1).sqrt()
    return mean.float().to(images.device), std.clamp(min=1e-6).float().to(images.device)


# ---- sources ----


def load_images(
    source: str,
    *,
    augmentation: str = "none",
    image_size: int | None = None,
    crop_size: int | None = None,
    seed: int = 0,
) -> ImageSplits:
    """Load ``digits``, a path or a data set of the hub.

    Args:
        source: ``digits``; a folder of idx files, of parquet files or of images by class (``train/CLASS/x.png`` and
            ``test/`` or ``validation/``); an npz file with ``train_images``, ``train_labels``, ``test_images``,
            ``test_labels``; or a name on the hub.
        augmentation: augmentation of the training images.
        image_size: resize to this many pixels; by default images of one size stay as they are.
        crop_size: then cut out this many; see :class:`ImageDataset`.
        seed: seed of the augmentation.

    Raises:
        ConfigurationError: the source is missing or holds no images; the message says what was looked for.
    """
    path = Path(source)
    if source == DIGITS:
        with files("hf_elra.recipes").joinpath("digits.npz").open("rb") as file:
            arrays = _from_npz(io.BytesIO(file.read()), source)
    elif path.is_file() and path.suffix == ".npz":
        arrays = _from_npz(path, source)
    elif path.is_dir() and list(path.glob("*-images-idx3-ubyte*")):
        arrays = _from_idx(path)
    elif path.exists():
        arrays = _from_datasets(_local_dataset(path), source, image_size)
    elif source.startswith((".", "/", "~")) or source.endswith("/") or source.count("/") > 1 or path.suffix:
        raise ConfigurationError(f"dataset={source!r} does not exist; give a folder, an npz file or a name on the hub.")
    else:
        arrays = _from_datasets(_hub_dataset(source), source, image_size)
    images: dict[str, Any] = {
        split: _as_images(arrays[f"{split}_images"], image_size, source) for split in ("train", "test")
    }
    labels = {split: _as_labels(arrays[f"{split}_labels"], f"{split}_labels", source) for split in images}
    mean, std = channel_statistics(images["train"])
    number = int(max(values.max() for values in labels.values())) + 1
    if unknown := set(labels["test"].tolist()) - set(labels["train"].tolist()):
        logger.warning("%s: no training image has the label(s) %s of test images.", source, sorted(unknown))
    classes = [str(c) for c in arrays.get("classes", range(number))]
    given: Any = {"crop_size": crop_size, "mean": mean, "std": std}
    train = ImageDataset(images["train"], labels["train"], augmentation=augmentation, seed=seed, **given)
    test = ImageDataset(images["test"], labels["test"], **given)
    return ImageSplits(source, train, test, classes, arrays.get("lossy_copy", False))


def _as_images(array: Any, image_size: int | None, name: str) -> Tensor | EncodedImages:
    if isinstance(array, EncodedImages):
        return array
    images = torch.as_tensor(np.asarray(array))
    if images.dim() == 3:
        images = images[:, None]
    elif images.dim() == 4 and images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.permute(0, 3, 1, 2)
    if images.dim() != 4 or images.dtype != torch.uint8 or len(images) == 0:
        raise ConfigurationError(
            f"dataset={name!r} holds {images.dtype} of shape {tuple(images.shape)}; uint8 images are needed, of shape "
            "(number, height, width) or (number, height, width, channels)."
        )
    if image_size is not None and images.shape[-2:] != (image_size, image_size):
        resized = torch.nn.functional.interpolate(
            images.float(), (image_size, image_size), mode="bilinear", antialias=True
        )
        images = resized.round_().clamp_(0, 255).to(torch.uint8)
    return images.contiguous()


def _as_labels(array: Any, what: str, name: str) -> Tensor:
    """Return class numbers, one for each image; a column vector counts as well."""
    labels = np.asarray(array)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iufb":
        raise ConfigurationError(
            f"dataset={name!r}: {what} are {labels.dtype} of shape {labels.shape}; one class number is needed for each "
            "image, shape (number,)."
        )
    return torch.as_tensor(labels.astype(np.int64))


def _from_npz(file: Any, name: str) -> dict[str, Any]:
    try:
        arrays = np.load(file, allow_pickle=False)
        if not hasattr(arrays, "files"):
            raise ValueError("it holds a single array")
        with arrays:
            return _named_arrays(arrays, name)
    except ConfigurationError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigurationError(
            f"dataset={name!r} cannot be read as an npz file of plain arrays (numpy.savez writes one): {error}"
        ) from error


def _named_arrays(arrays: Any, name: str) -> dict[str, Any]:
    found = set(arrays.files)
    if {"train_bytes", "train_offsets", "test_bytes", "test_offsets"} <= found:  # encoded images, one after the other
        decoded: dict[str, Any] = {"lossy_copy": arrays["train_bytes"][:2].tobytes() == b"\xff\xd8"}
        for split in ("train", "test"):
            content, offsets = arrays[f"{split}_bytes"].tobytes(), arrays[f"{split}_offsets"]
            parts = [content[a:b] for a, b in pairwise(offsets)]
            decoded[f"{split}_images"] = np.stack([np.asarray(_decode(part)) for part in parts])
            decoded[f"{split}_labels"] = arrays[f"{split}_labels"]
        return decoded
    wanted = {f"{split}_{kind}" for split in ("train", "test") for kind in ("images", "labels")}
    if not wanted <= found:
        raise ConfigurationError(
            f"dataset={name!r} holds {', '.join(sorted(found))}; needed are {', '.join(sorted(wanted))}."
        )
    return {key: arrays[key] for key in wanted}


def _decode(content: bytes) -> Any:
    from PIL import Image

    return with_8_bits(Image.open(io.BytesIO(content)), colour=True)


def _from_idx(folder: Path) -> dict[str, Any]:
    arrays = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for kind, ending in (("images", "images-idx3-ubyte"), ("labels", "labels-idx1-ubyte")):
            names = [folder / f"{prefix}-{ending}{suffix}" for suffix in ("", ".gz")]
            path = next((path for path in names if path.is_file()), None)
            if path is None:
                raise ConfigurationError(f"dataset={str(folder)!r} lacks {names[0].name}[.gz].")
            arrays[f"{split}_{kind}"] = read_idx(path)
    return arrays


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of unsigned bytes (MNIST's format), gzipped or not.

    Raises:
        ConfigurationError: it is not an idx file, or it was cut short.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (EOFError, OSError, zlib.error) as error:
        raise ConfigurationError(f"{str(path)!r} cannot be read: {error}.") from None
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ConfigurationError(f"{str(path)!r} is not an idx file of unsigned bytes.")
    dimensions = content[3]
    shape = tuple(np.frombuffer(content, ">u4", dimensions, 4).astype(int))
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if values.size != math.prod(shape):
        raise ConfigurationError(f"{str(path)!r} is cut short: {values.size} bytes of {math.prod(shape)}.")
    return values.reshape(shape).copy()


def _local_dataset(path: Path) -> Any:
    datasets = needed_by_recipes("datasets")

    if path.is_dir() and (parquet := sorted(path.rglob("*.parquet"))):
        try:
            return datasets.load_dataset("parquet", data_files=_by_split(parquet, path))
        except Exception as error:  # pyarrow raises for a file that is not parquet, datasets for columns that differ
            raise ConfigurationError(
                f"dataset={str(path)!r} holds parquet files that cannot be read: {error.__cause__ or error}"
            ) from error
    if path.suffix == ".parquet":
        raise ConfigurationError(f"dataset={str(path)!r}: give the folder that holds the train and test parquet files.")
    if path.is_dir():
        try:
            return datasets.load_dataset("imagefolder", data_dir=str(path), drop_labels=False)
        except Exception as error:
            raise ConfigurationError(f"dataset={str(path)!r} holds no images that can be read: {error}") from error
    raise ConfigurationError(f"dataset={str(path)!r} is neither a folder nor an npz file.")


def _by_split(files: list[Path], folder: Path) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(folder)), []).append(glob.escape(str(file)))
    return splits


def _split_of(file: Path) -> str:
    """Return the split that a file or its nearest folder is named after: test-00000.parquet, test/00000.parquet."""
    for part in reversed(file.parts):
        words = set(re.split("[^a-z]+", part.lower()))
        for split, names in SPLIT_WORDS.items():
            if words & names:
                return split
    return next((split for split in SPLIT_WORDS if split in file.name.lower()), "train")


def _hub_dataset(name: str) -> Any:
    datasets = needed_by_recipes("datasets")

    try:
        return datasets.load_dataset(name)
    except Exception as error:
        raise ConfigurationError(
            f"dataset={name!r} is not a local path and could not be loaded from the hub: {error}"
        ) from error


def _from_datasets(splits: Any, name: str, image_size: int | None) -> dict[str, Any]:
    """Return images and labels of a ``datasets.DatasetDict``, decoded into memory if they fit there."""
    datasets = needed_by_recipes("datasets")

    present = [split for split in TEST_SPLITS if split in splits]
    if "train" not in splits or not present:
        raise ConfigurationError(
            f"dataset={name!r} has the splits {', '.join(splits)}; train, and test or validation, are needed "
            "(in a folder of images: train/CLASS/x.png and test/CLASS/x.png)."
        )
    features = splits["train"].features
    image = next((key for key, feature in features.items() if isinstance(feature, datasets.Image)), None)
    label = next((key for key in features if "label" in key), None)  # the fine labels of CIFAR-100 come first
    if image is None or label is None:
        raise ConfigurationError(
            f"dataset={name!r} has the columns {', '.join(features)}; images with labels are needed."
        )
    if not str(features[label].dtype).startswith(("int", "uint")):
        raise ConfigurationError(f"dataset={name!r}: the column {label} holds no class numbers.")
    # ImageNet's own test split on the hub has no labels, only -1.
    test = next((split for split in present if min(splits[split][label], default=-1) >= 0), None)
    if test is None:
        raise ConfigurationError(f"dataset={name!r}: none of the splits {', '.join(present)} is labelled.")
    with naming_broken_images():
        first = [row[image] for row in splits["train"].select(range(min(8, len(splits["train"]))))]
    decode = functools.partial(
        _pixels, image_size=image_size, colour=any(p.mode not in GREY_MODES for p in first), name=name
    )
    height, width, channels = np.atleast_3d(decode(first[0])).shape
    encoded = {
        split: EncodedImages(splits[source], image, decode, (len(splits[source]), channels, height, width))
        for split, source in (("train", "train"), ("test", test))
    }
    free = needed_by_recipes("psutil").virtual_memory().available
    fit = sum(math.prod(e.shape) for e in encoded.values()) <= MEMORY_SHARE * free
    arrays: dict[str, Any] = {"classes": features[label].names} if hasattr(features[label], "names") else {}
    for split, images in encoded.items():
        arrays[f"{split}_images"] = images.decoded(f"decoding {split} images of {name}") if fit else images
        arrays[f"{split}_labels"] = np.asarray(images.rows[label])
    return arrays


def _pixels(picture: Any, *, image_size: int | None, colour: bool, name: str) -> np.ndarray:
    """Return a decoded image; with ``image_size`` its shorter side is resized to it and the middle is cut out."""
    picture = with_8_bits(picture, colour=colour)
    if image_size is None:
        if picture.width != picture.height:
            raise ConfigurationError(f"dataset={name!r} holds images that are not square; give --image_size.")
        return np.asarray(picture)
    return np.asarray(shorter_side_to(picture, image_size))
