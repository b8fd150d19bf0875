"""What ``gpu_check.py`` needs on a machine that has a GPU and no network: one folder, a few tens of MiB.

    python scripts/gpu_bundle.py --output gpu-bundle --text train.txt.gz --validation validation.txt.gz \\
        --pictures cifar10.npz --wheels datasets evaluate dill multiprocess

Tokens are made here, with the tokenizer of --tokenizer or a BPE of 32,000 pieces that is trained on the text; without
--text the text is the documentation that every Python carries. Pictures are an npz file as for
``train_image_classifier.py``; without them gpu_check.py takes the digits of this package. Wheels are those of the
Python and the platform of that machine, without what they need: name every package that is missing there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from hf_elra.errors import ConfigurationError
from hf_elra.recipes import text_data

POSITIONS = 256
PIECES = 32_000
MOST_MIB = 60


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    parser.add_argument("--text", help="training text: txt, jsonl, csv or parquet, maybe .gz")
    parser.add_argument("--validation", help="the same for validation")
    parser.add_argument("--tokenizer", help="folder or tokenizer.model")
    parser.add_argument("--vocab_size", type=int, default=PIECES, help="pieces of a tokenizer that is trained here")
    parser.add_argument("--pictures", type=Path, help="npz file of images")
    parser.add_argument("--wheels", nargs="*", default=[], help="packages to bring along, NAME or NAME==VERSION")
    parser.add_argument("--python", default="3.12", help="Python of the machine with the GPU. Default: 3.12.")
    given = parser.parse_args(words)
    if given.validation and not given.text:
        parser.error("--validation needs --text beside it")
    if given.pictures is not None and not given.pictures.is_file():
        parser.error(f"--pictures {given.pictures} does not exist")
    return given


def main(words: list[str]) -> int:
    """Make the folder."""
    given = parse(words)
    given.output.mkdir(parents=True, exist_ok=True)
    try:
        write_text(given)
    except ConfigurationError as error:
        print(f"gpu_bundle.py: error: {error}", file=sys.stderr)
        return 2
    if given.pictures is not None:
        shutil.copyfile(given.pictures, given.output / "pictures.npz")
    if given.wheels:
        platforms = [f"manylinux_2_{n}_x86_64" for n in (34, 28, 27, 17)] + ["manylinux2014_x86_64"]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", given.python, "--implementation", "cp", "-d", str(given.output / "wheels")]
        command += [word for platform in platforms for word in ("--platform", platform)]
        subprocess.run([*command, *given.wheels], check=True)
    size = sum(file.stat().st_size for file in given.output.rglob("*") if file.is_file()) / 2**20
    print(f"{given.output}: {size:.1f} MiB")
    if size > MOST_MIB:
        print(
            f"gpu_bundle.py: error: more than {MOST_MIB} MiB; give a shorter text or fewer pictures.", file=sys.stderr
        )
        return 1
    return 0


def write_text(given: argparse.Namespace) -> None:
    """Write ``text.npz``: tokens for training and validation, 16 bits each."""
    if given.text:
        texts = text_data.load_texts(train_file=given.text, validation_file=given.validation)
    else:
        texts = text_data.load_texts(dataset=text_data.PYTHON_DOCS)
    if given.tokenizer:
        tokenizer = text_data.load_tokenizer(given.tokenizer)
    else:
        tokenizer = text_data.train_tokenizer(texts.train, given.vocab_size)
    if len(tokenizer) > 2**16:
        raise ConfigurationError(f"tokenizer={given.tokenizer!r} has {len(tokenizer)} pieces, more than 65,536.")
    blocks = {
        name: text_data.tokenise(documents, tokenizer, POSITIONS, name).with_format("numpy")["input_ids"]
        for name, documents in (("train", texts.train), ("validation", texts.validation))
    }
    tokens = {name: np.asarray(rows[:]).astype(np.uint16).reshape(-1) for name, rows in blocks.items()}
    np.savez_compressed(given.output / "text.npz", **tokens, pieces=len(tokenizer), name=texts.name)
    print(f"{texts.name}: {tokens['train'].size:,} training tokens, {tokens['validation'].size:,} for validation")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
