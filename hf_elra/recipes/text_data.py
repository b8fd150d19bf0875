"""Text for language models: where documents come from, a tokenizer for them, and fixed blocks of tokens.

Documents come from files, from the hub, or from the English documentation that every Python carries. Tokenising and
packing happen once; ``datasets`` caches the result. Models and training settings live in ``babyllama.py``.
"""

from __future__ import annotations

import ast
import glob
import gzip
import hashlib
import math
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_elra.errors import ConfigurationError, nearest, needed_by_recipes

if TYPE_CHECKING:
    from datasets import Dataset

END_OF_TEXT = "<|endoftext|>"
PYTHON_DOCS = "python-docs"
_HELD_OUT = 20  # one document in this many is for validation, if no validation text is given
_TOKENIZER_SAMPLE = 50_000_000  # characters; more of them hardly change the pieces of a BPE, and cost memory
_BLOCK_FORMAT = 1  # part of the cache key: raise it when packing changes


@dataclass
class Texts:
    """Documents for training and for validation."""

    train: list[str]
    validation: list[str]
    name: str


# ---- documents ----


def load_texts(
    *,
    dataset: str = PYTHON_DOCS,
    dataset_config: str | None = None,
    text_column: str = "text",
    train_file: str | None = None,
    validation_file: str | None = None,
) -> Texts:
    """Load documents from files if any are given, else from ``dataset`` (``python-docs`` or a name on the hub).

    Without a validation text every twentieth document (or the last twentieth of a text that is in one piece) is held
    out.

    Raises:
        ConfigurationError: a file is missing, empty or damaged, or has no text in a column ``text_column``; the data
            set cannot be loaded or has no training split.
    """
    if validation_file and not train_file:
        raise ConfigurationError(f"validation_file={validation_file!r} needs --train_file beside it.")
    if train_file:
        train = read_documents(train_file, "train_file", text_column)
        name = Path(train_file).name
        if validation_file:
            return Texts(train, read_documents(validation_file, "validation_file", text_column), name)
        return hold_out(train, name)
    if dataset == PYTHON_DOCS:
        return hold_out(python_documentation(), PYTHON_DOCS)
    datasets = needed_by_recipes("datasets")
    try:
        loaded = datasets.load_dataset(dataset, dataset_config)
    except Exception as error:  # the hub raises many: offline, no such name, gated, no such configuration
        hint = nearest(dataset, [PYTHON_DOCS])
        raise ConfigurationError(
            f"dataset={dataset!r} could not be loaded ({type(error).__name__}: {str(error).splitlines()[0]}).{hint} "
            f"Give a data set of the hub, local files with --train_file, or --dataset {PYTHON_DOCS}."
        ) from error
    if "train" not in loaded:
        raise ConfigurationError(
            f"dataset={dataset!r} has the split(s) {', '.join(loaded)}; one called train is needed. Give its file with "
            "--train_file instead."
        )
    train = _column(loaded["train"], text_column, f"dataset={dataset!r}")
    for split in ("validation", "test"):
        if split in loaded:
            return Texts(train, _column(loaded[split], text_column, f"dataset={dataset!r}"), dataset)
    return hold_out(train, dataset)


def read_documents(path: str, flag: str, text_column: str) -> list[str]:
    """Read the documents of a txt (``<|endoftext|>`` between them), jsonl, csv or parquet file, gzipped or not."""
    file = Path(path)
    if not file.is_file():
        raise ConfigurationError(f"{flag}={path!r} does not exist or is not a file.")
    kind = file.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    if kind in ("jsonl", "json", "csv", "parquet"):
        if file.stat().st_size == 0:
            raise ConfigurationError(f"{flag}={path!r} is empty.")
        datasets = needed_by_recipes("datasets")
        try:
            loaded = datasets.load_dataset(kind.removesuffix("l"), data_files=glob.escape(path), split="train")
        except Exception as error:  # datasets, pyarrow, gzip and zlib raise their own errors for damaged files
            reason = str(error.__cause__ or error) or "nothing is in it"
            raise ConfigurationError(f"{flag}={path!r} cannot be read as {kind}: {reason}") from error
        documents = _column(loaded, text_column, f"{flag}={path!r}")
    else:
        try:
            with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as stream:
                documents = [part.strip() for part in stream.read().split(END_OF_TEXT)]
        except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
            raise ConfigurationError(f"{flag}={path!r} is not UTF-8 text: {error}.") from error
    documents = [document for document in documents if document]
    if not documents:
        raise ConfigurationError(f"{flag}={path!r} holds no text.")
    return documents


def _column(data: Dataset, name: str, source: str) -> list[str]:
    if name not in data.column_names:
        raise ConfigurationError(
            f"{source} has no column {name!r}.{nearest(name, data.column_names)} "
            f"Its columns: {', '.join(data.column_names)}. Choose with --text_column."
        )
    kind = data.features[name]
    if getattr(kind, "dtype", None) not in ("string", "large_string", "null"):
        raise ConfigurationError(f"{source}: its column {name!r} holds {kind}, not text. Choose with --text_column.")
    documents = [document for document in data[name] if document is not None]
    if not documents:
        raise ConfigurationError(f"{source}: its column {name!r} holds no text. Choose with --text_column.")
    return documents


def hold_out(documents: list[str], name: str) -> Texts:
    """Split off every twentieth document, or the end of the text where there are fewer than twenty."""
    if len(documents) >= _HELD_OUT:
        train = [document for i, document in enumerate(documents) if i % _HELD_OUT]
        return Texts(train, documents[::_HELD_OUT], name)
    text = "\n\n".join(documents)
    cut = len(text) - len(text) // _HELD_OUT
    return Texts([text[:cut]], [text[cut:]], name)


def python_documentation() -> list[str]:
    """Return the English documentation that every Python carries: ``pydoc_data.topics`` and docstrings.

    One document per topic and per module of the standard library, in a fixed order; only ``pydoc_data`` is imported.
    """
    from pydoc_data import topics

    documents = [text.strip() for _, text in sorted(topics.topics.items())]
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"}
    for file in sorted(root.rglob("*.py")):
        if skipped & set(file.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        parts = []
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                doc = ast.get_docstring(node)
                if doc:
                    parts.append(doc if isinstance(node, ast.Module) else f"{node.name}: {doc}")
        if parts:
            documents.append("\n\n".join(parts))
    if sum(map(len, documents)) < 200_000:
        raise ConfigurationError(
            f"dataset={PYTHON_DOCS!r}: this Python's standard library at {root} carries too little documentation; "
            "give a text with --train_file."
        )
    return documents


# ---- tokens ----


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from the hub, from a folder, or from a SentencePiece ``tokenizer.model``."""
    try:
        if name_or_path.endswith(".model"):
            if not Path(name_or_path).is_file():
                raise OSError("no such file")
            if find_spec("sentencepiece") is None:
                raise OSError("it needs the sentencepiece package (pip install sentencepiece)")
            tokenizer = LlamaTokenizer.from_pretrained(str(Path(name_or_path).parent))
        else:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"tokenizer={name_or_path!r} cannot be loaded: {str(error).splitlines()[0]}. "
            "Give a name on the hub, a folder or a tokenizer.model; without --tokenizer one is trained."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigurationError(f"tokenizer={name_or_path!r} has no end-of-text token, which separates documents.")
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of ``vocab_size`` pieces, the first of which is ``<|endoftext|>``."""
    if vocab_size < 257:
        raise ConfigurationError(f"vocab_size={vocab_size} must be at least 257: 256 bytes and {END_OF_TEXT}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_characters(documents, _TOKENIZER_SAMPLE), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def _first_characters(documents: Iterable[str], limit: int) -> Iterator[str]:
    for document in documents:
        if limit <= 0:
            return
        yield document[:limit]
        limit -= len(document)


def tokenise(documents: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int, what: str) -> Dataset:
    """Tokenise documents and pack them, an end-of-text token after each, into blocks of ``block_size`` tokens.

    Args:
        documents: the texts.
        tokenizer: any fast tokenizer with an end-of-text token.
        block_size: tokens in a block.
        what: what these documents are, for the error.

    Raises:
        ConfigurationError: the text is shorter than one block.

    Returns:
        A data set with one column ``input_ids``, each row a list of ``block_size`` integers; cached on disk by content.
    """
    datasets = needed_by_recipes("datasets")
    tokens = 0
    for document in documents:
        tokens += len(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]) + 1
        if tokens >= block_size:
            break
    else:
        raise ConfigurationError(
            f"the {what} text has {tokens} tokens, fewer than one block of {block_size}; "
            "give more text or lower --block_size."
        )
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    state = {"format": _BLOCK_FORMAT, "text": digest.hexdigest(), "tokenizer": _tokenizer_key(tokenizer)}
    return datasets.Dataset.from_generator(
        _blocks,
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
        gen_kwargs={"source": _Source(documents, tokenizer, state), "block_size": block_size},
    )


class _Source:
    """Documents and tokenizer for ``_blocks``; it pickles as a key of its content, which is then the cache's key."""

    def __init__(self, documents: list[str], tokenizer: Any, key: dict[str, Any]) -> None:
        self.documents, self.tokenizer, self.key = documents, tokenizer, key

    def __reduce__(self) -> tuple[Any, ...]:
        return (dict, (tuple(sorted(self.key.items())),))


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _blocks(source: _Source, block_size: int) -> Iterator[dict[str, list[int]]]:
    buffer: list[int] = []
    documents = iter(source.documents)
    while batch := list(islice(documents, 256)):
        encoded = source.tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        buffer.extend(chain.from_iterable([*ids, source.tokenizer.eos_token_id] for ids in encoded))
        whole = len(buffer) - len(buffer) % block_size
        for start in range(0, whole, block_size):
            yield {"input_ids": buffer[start : start + block_size]}
        buffer = buffer[whole:]


def unigram_entropy(blocks: Dataset) -> float:
    """Return the entropy of the distribution of single tokens in ``blocks``, in nats per token.

    No model that ignores context can have a lower loss on this text.
    """
    counts: Counter[int] = Counter()
    for rows in blocks.iter(batch_size=1000):
        counts.update(chain.from_iterable(rows["input_ids"]))
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())
