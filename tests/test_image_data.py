"""Images: every source, augmentation, batches; local files only."""

import gzip
import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_elra import ConfigurationError
from hf_elra.recipes import image_data
from hf_elra.recipes.image_data import (
    EncodedImages,
    ImageDataset,
    as_batch,
    augment,
    channel_statistics,
    load_images,
)
from hf_elra.recipes.image_models import SmallImageProcessor, with_8_bits

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 10), dtype=np.uint8)
LABELS = np.arange(12, dtype=np.uint8) % 3


def idx(array):
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_digits_are_real_and_in_the_package():
    data = load_images("digits")
    assert len(data.train) == 1437
    assert len(data.test) == 360
    assert data.train.images.shape[1:] == (1, 8, 8)
    assert data.train.labels.bincount().min() > 130
    assert len(data.classes) == 10


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files(tmp_path, zipped):
    for prefix, part in (("train", slice(0, 9)), ("t10k", slice(9, 12))):
        for name, array in (("images-idx3-ubyte", PIXELS[part]), ("labels-idx1-ubyte", LABELS[part])):
            content = idx(array)
            path = tmp_path / f"{prefix}-{name}{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)
    data = load_images(str(tmp_path))
    assert np.array_equal(data.train.images[:, 0].numpy(), PIXELS[:9])
    assert data.test.labels.tolist() == LABELS[9:].tolist()
    path.write_bytes(gzip.compress(content[:-1]) if zipped else content[:-1])
    with pytest.raises(ConfigurationError, match="cut short: 2 bytes of 3"):
        load_images(str(tmp_path))
    path.unlink()
    with pytest.raises(ConfigurationError, match="lacks t10k-labels-idx1-ubyte"):
        load_images(str(tmp_path))


def test_npz_of_arrays_and_of_encoded_images(tmp_path):
    arrays = dict(train_images=PIXELS[:9], train_labels=LABELS[:9], test_images=PIXELS[9:], test_labels=LABELS[9:])
    np.savez(tmp_path / "a.npz", **arrays)
    assert np.array_equal(load_images(str(tmp_path / "a.npz")).train.images[:, 0].numpy(), PIXELS[:9])
    encoded = {"train_labels": LABELS[:9], "test_labels": LABELS[9:]}
    for split, part in (("train", PIXELS[:9]), ("test", PIXELS[9:])):
        files = [png(array) for array in part]
        encoded[f"{split}_bytes"] = np.frombuffer(b"".join(files), np.uint8)
        encoded[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "b.npz", **encoded)
    images = load_images(str(tmp_path / "b.npz")).train.images
    assert images.shape == (9, 3, 10, 10)
    assert np.array_equal(images[:, 1].numpy(), PIXELS[:9])
    np.savez(tmp_path / "c.npz", pixels=PIXELS)
    with pytest.raises(ConfigurationError, match="holds pixels; needed are test_images, test_labels"):
        load_images(str(tmp_path / "c.npz"))


@pytest.mark.parametrize("shape", [(-1, 1), (-1,)])
def test_labels_may_stand_in_a_column(tmp_path, shape):
    """As in MedMNIST and in Keras' CIFAR."""
    arrays = dict(train_images=PIXELS[:9], test_images=PIXELS[9:], test_labels=LABELS[9:].reshape(shape))
    np.savez(tmp_path / "a.npz", train_labels=LABELS[:9].reshape(shape), **arrays)
    data = load_images(str(tmp_path / "a.npz"))
    assert data.train.labels.tolist() == LABELS[:9].tolist()
    assert len(data.classes) == 3
    for labels in (np.eye(3, dtype=int)[LABELS[:9]], LABELS[:9].astype(str), LABELS[0]):
        np.savez(tmp_path / "a.npz", train_labels=labels, **arrays)
        with pytest.raises(ConfigurationError, match=r"train_labels are .* of shape .*; one class number is needed"):
            load_images(str(tmp_path / "a.npz"))


def test_files_that_are_no_archive_or_are_damaged_are_named(tmp_path):
    path = tmp_path / "a.npz"
    np.save(tmp_path / "a.npy", PIXELS)
    np.savez_compressed(path, train_images=PIXELS, train_labels=LABELS, test_images=PIXELS, test_labels=LABELS)
    damaged = bytearray(path.read_bytes())
    damaged[200:260] = b"\xff" * 60
    contents = [b"no zip", b"", (tmp_path / "a.npy").read_bytes(), bytes(damaged), path.read_bytes()[:-100]]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ConfigurationError, match="a.npz' cannot be read as an npz file of plain arrays"):
            load_images(str(path))
    zipped = bytearray(gzip.compress(idx(PIXELS % 4), mtime=0))
    zipped[200:220] = b"\xff" * 20
    (tmp_path / "a-images-idx3-ubyte.gz").write_bytes(zipped)
    with pytest.raises(ConfigurationError, match="a-images-idx3-ubyte.gz' cannot be read: Error -3"):
        image_data.read_idx(tmp_path / "a-images-idx3-ubyte.gz")


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_grey_values_of_16_bits_are_scaled_to_8(tmp_path, mode):
    for split in ("train", "test"):
        for i in range(3):
            folder = tmp_path / split / "abc"[i]
            folder.mkdir(parents=True)
            values = PIXELS[i].astype(np.uint16) * 257 if mode == "I;16" else PIXELS[i].astype(np.int32)
            picture = Image.fromarray(values)
            assert picture.mode == mode
            picture.save(folder / ("1.png" if mode == "I;16" else "1.tif"))
    data = load_images(str(tmp_path))
    assert np.array_equal(data.train.images[:, 0].numpy(), PIXELS[:3])
    processor = SmallImageProcessor([0], [1])  # what the saved model is fed with
    assert np.array_equal(processor([picture])["pixel_values"], PIXELS[2:3, None].astype(np.float32) / 255)
    large = Image.fromarray(PIXELS[2].astype(np.int32) * 257)  # 16 bits in 32
    assert np.array_equal(np.asarray(with_8_bits(large, colour=False)), PIXELS[2])


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(path):
    for split, part in (("train", range(9)), ("test", range(9, 12))):
        for i in part:
            folder = path / split / "abc"[LABELS[i]]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.png").write_bytes(png(PIXELS[i]))


def test_images_that_do_not_fit_into_memory_are_decoded_batch_by_batch(tmp_path, monkeypatch):
    write_folder(tmp_path)
    given = dict(image_size=20, crop_size=16, augmentation="flip+crop")
    kept = load_images(str(tmp_path), **given)
    monkeypatch.setattr(image_data, "MEMORY_SHARE", 0)
    encoded = load_images(str(tmp_path), **given)
    assert isinstance(kept.train.images, torch.Tensor)
    assert isinstance(encoded.train.images, EncodedImages)
    assert encoded.train.to("cpu").shape == kept.train.shape == (1, 16, 16)
    assert encoded.classes == kept.classes
    for split in ("train", "test"):
        for workers in (0, 2):
            one, other = (
                list(DataLoader(getattr(data, split), 4, collate_fn=as_batch, num_workers=workers))
                for data in (kept, encoded)
            )
            assert len(one) == len(other)
            for batch, same in zip(one, other, strict=True):
                assert batch["pixel_values"].shape[1:] == (1, 16, 16)
                assert torch.equal(batch["labels"], same["labels"])
                assert torch.equal(batch["pixel_values"], same["pixel_values"])


def test_mean_and_deviation_of_encoded_images_come_from_a_sample(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.setattr(image_data, "MEMORY_SHARE", 0)
    monkeypatch.setattr(image_data, "SAMPLED_IMAGES", 3)
    data = load_images(str(tmp_path)).train
    mean, std = channel_statistics(data.images[torch.tensor([0, 4, 8])])
    assert torch.equal(data.mean.flatten(), mean)
    assert torch.equal(data.std.flatten(), std)


def test_images_of_different_size_need_a_size(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "a" / "other.png").write_bytes(png(np.zeros((12, 12), np.uint8)))
    with pytest.raises(ConfigurationError, match="images differ in size; give --image_size"):
        load_images(str(tmp_path))
    assert load_images(str(tmp_path), image_size=9).train.shape == (1, 9, 9)


def test_the_labelled_split_is_tested_on(monkeypatch):
    """ImageNet's own test split on the hub has no labels, only -1."""
    import datasets

    def split(value, kind="int64"):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
        rows = {"image": [Image.fromarray(PIXELS[0])] * 2, "label": [value] * 2}
        return datasets.Dataset.from_dict(rows, features=features)

    splits = datasets.DatasetDict(train=split(1), validation=split(1), test=split(-1))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits)
    assert load_images("imagenet-1k").test.labels.tolist() == [1, 1]
    del splits["validation"]
    with pytest.raises(ConfigurationError, match="none of the splits test is labelled"):
        load_images("imagenet-1k")
    splits["train"] = split("cat", "string")
    with pytest.raises(ConfigurationError, match="the column label holds no class numbers"):
        load_images("imagenet-1k")


def test_folder_of_images_by_class(tmp_path):
    write_folder(tmp_path)
    data = load_images(str(tmp_path))
    assert data.classes == ["a", "b", "c"]
    assert data.train.images.shape == (9, 1, 10, 10)
    assert sorted(data.train.labels.tolist()) == sorted(LABELS[:9].tolist())
    assert load_images(str(tmp_path), image_size=16).test.images.shape == (3, 1, 16, 16)


@pytest.mark.parametrize("name", ["{}-00000-of-00001.parquet", "{}/0000.parquet", "data [1]/{}/0000.parquet"])
def test_folder_of_parquet_files(tmp_path, name):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})
    for split, part in (("train", slice(0, 9)), ("test", slice(9, 12))):
        rows = {"img": [Image.fromarray(p) for p in PIXELS[part]], "label": LABELS[part].tolist()}
        path = tmp_path / "latest" / name.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    data = load_images(str(tmp_path))
    assert np.array_equal(data.train.images[:, 0].numpy(), PIXELS[:9])
    assert data.classes == ["x", "y", "z"]
    path.write_bytes(b"no parquet")
    with pytest.raises(ConfigurationError, match="holds parquet files that cannot be read: Parquet"):
        load_images(str(tmp_path))


def test_images_that_are_not_square_need_a_size(tmp_path):
    for split in ("train", "test"):
        for name in "ab":
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.fromarray(np.zeros((10, 14, 3), np.uint8)).save(folder / "1.png")
    with pytest.raises(ConfigurationError, match="not square; give --image_size"):
        load_images(str(tmp_path))
    assert load_images(str(tmp_path), image_size=8).train.images.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("source", ["./nowhere", "nowhere.npz", "/nowhere/at/all"])
def test_missing_files_are_named(source):
    with pytest.raises(ConfigurationError, match=f"dataset='{source}' does not exist"):
        load_images(source)


def test_a_name_that_the_hub_does_not_give_is_named():
    with pytest.raises(ConfigurationError, match="dataset='no_such_data' is not a local path and could not be loaded"):
        load_images("no_such_data")


# ---- batches ----


def dataset(**given):
    images = torch.as_tensor(PIXELS)[:, None].expand(-1, 3, -1, -1).contiguous()
    return ImageDataset(images, torch.as_tensor(LABELS), **given)


def test_batches_are_normalised_and_whole():
    data = dataset()
    mean, std = channel_statistics(data.images)
    torch.testing.assert_close(mean, data.images.double().div(255).mean((0, 2, 3)).float())
    torch.testing.assert_close(std, data.images.double().div(255).std((0, 2, 3), correction=0).float())
    batches = list(DataLoader(data, batch_size=5, collate_fn=as_batch))
    assert [len(batch["labels"]) for batch in batches] == [5, 5, 2]
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3), correction=0), torch.ones(3))
    torch.testing.assert_close(as_batch([data[3], data[7]])["pixel_values"], pixels[[3, 7]])


def test_augmentation_is_the_papers():
    """Flips of half of the images; crops of 10 pixels from the image padded by 4 in reflect mode."""
    pixels = torch.arange(2000 * 3 * 100, dtype=torch.float32).view(2000, 3, 10, 10)
    generator = torch.Generator().manual_seed(0)
    flipped = augment(pixels, "flip", generator)
    same = (flipped == pixels).flatten(1).all(1)
    mirrored = (flipped == pixels.flip(3)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 900 < same.sum() < 1100
    cropped = augment(pixels, "flip+crop", generator)
    padded = torch.nn.functional.pad(pixels, (4, 4, 4, 4), mode="reflect")
    windows = padded.unfold(2, 10, 1).unfold(3, 10, 1)
    seen = set()
    for i in range(300):
        found = [
            (top, left)
            for top in range(9)
            for left in range(9)
            for window in (windows[i, :, top, left], windows[i, :, top, left].flip(2))
            if torch.equal(window, cropped[i])
        ]
        assert found
        seen.add(found[0])
    assert len(seen) > 60  # of 81


def test_crops_are_random_in_training_and_from_the_middle_in_evaluation():
    pixels = torch.arange(400 * 100, dtype=torch.float32).view(400, 1, 10, 10)
    cropped = augment(pixels, "flip+crop", torch.Generator().manual_seed(0), crop_size=6)
    assert cropped.shape == (400, 1, 6, 6)
    windows = torch.nn.functional.pad(pixels, (4, 4, 4, 4), mode="reflect").unfold(2, 6, 1).unfold(3, 6, 1)
    assert windows.shape[2:4] == (13, 13)
    for i in range(100):
        same = (windows[i, 0] == cropped[i, 0]).flatten(2).all(2) | (windows[i, 0] == cropped[i, 0].flip(1)).flatten(
            2
        ).all(2)
        assert same.any()
    whole, middle = dataset(), dataset(crop_size=6)
    assert torch.equal(
        middle.__getitems__([1, 2])["pixel_values"], whole.__getitems__([1, 2])["pixel_values"][:, :, 2:8, 2:8]
    )
    assert (whole.shape, middle.shape) == ((3, 10, 10), (3, 6, 6))
    with pytest.raises(ConfigurationError, match="crop_size=11 must be between 1 and the 10 pixels"):
        dataset(crop_size=11)


def test_augmentation_depends_on_seed_and_rows_alone():
    one, two, other = (
        dataset(augmentation="flip+crop"),
        dataset(augmentation="flip+crop"),
        dataset(augmentation="flip+crop", seed=1),
    )
    torch.rand(3)
    rows = [1, 5, 3]
    assert torch.equal(one.__getitems__(rows)["pixel_values"], two.__getitems__(rows)["pixel_values"])
    assert not torch.equal(one.__getitems__(rows)["pixel_values"], other.__getitems__(rows)["pixel_values"])


def test_wrong_arguments_are_named():
    with pytest.raises(ConfigurationError, match="augmentation='flop'"):
        dataset(augmentation="flop")
    with pytest.raises(ConfigurationError, match="with 2 labels"):
        ImageDataset(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(2))
