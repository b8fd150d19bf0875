"""Documents, tokenizers and packing."""

import gzip
import json
import math

import pytest
from datasets import Dataset

from hf_elra import ConfigurationError
from hf_elra.recipes.text_data import (
    END_OF_TEXT,
    hold_out,
    load_texts,
    load_tokenizer,
    python_documentation,
    tokenise,
    train_tokenizer,
    unigram_entropy,
)

STORIES = [f"Story {i}: the cat number {i} sat on the mat and looked at the moon." for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(STORIES, 300)


def write(folder, name, documents):
    path = folder / name
    if "txt" in name:
        text = f"\n{END_OF_TEXT}\n".join(documents)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    elif "jsonl" in name:
        path.write_text("".join(json.dumps({"text": d, "n": i}) + "\n" for i, d in enumerate(documents)))
    elif "csv" in name:
        Dataset.from_dict({"text": documents}).to_csv(str(path), index=False)
    else:
        Dataset.from_dict({"text": documents}).to_parquet(str(path))
    return str(path)


@pytest.mark.parametrize("name", ["stories.txt", "stories.txt.gz", "stories.jsonl", "stories.csv", "stories.parquet"])
def test_files_of_every_kind_give_the_same_documents(tmp_path, name):
    path = write(tmp_path, name, STORIES)
    texts = load_texts(train_file=path, validation_file=path)
    assert texts.train == texts.validation == STORIES
    held = load_texts(train_file=path)
    assert held.validation == STORIES[::20]
    assert sorted(held.train + held.validation) == sorted(STORIES)


def test_text_in_one_piece_is_cut_at_its_end():
    texts = hold_out(["x" * 95 + "y" * 5], "name")
    assert texts.train == ["x" * 95]
    assert texts.validation == ["y" * 5]


def test_names_with_brackets_and_byte_order_marks_are_no_part_of_the_text(tmp_path):
    path = write(tmp_path, "my[1] *.jsonl", STORIES)
    assert load_texts(train_file=path, validation_file=path).train == STORIES
    (tmp_path / "marked.txt").write_text(STORIES[0], encoding="utf-8-sig")
    (tmp_path / "marked.txt.gz").write_bytes(gzip.compress((tmp_path / "marked.txt").read_bytes()))
    for name in ("marked.txt", "marked.txt.gz"):
        path = str(tmp_path / name)
        assert load_texts(train_file=path, validation_file=path).train == STORIES[:1]


def damaged(content):
    """Gzipped, with wrong bytes in its middle."""
    zipped = bytearray(gzip.compress(content, mtime=0))
    middle = len(zipped) // 2
    zipped[middle : middle + 20] = b"\xff" * 20
    return bytes(zipped)


LINES = "".join(json.dumps({"text": f"{i * i}"}) + "\n" for i in range(1000)).encode()


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "missing.txt", "does not exist"),
        (b"", "empty.txt", "holds no text"),
        (b" \n<|endoftext|>\n ", "blank.txt", "holds no text"),
        (b"\xff\xfe\x00bad", "latin.txt", "not UTF-8 text"),
        (b"no gzip", "plain.txt.gz", "not UTF-8 text"),
        (b"", "empty.jsonl", "is empty"),
        (b'{"txet": "a"}\n', "column.jsonl", "no column 'text'. Did you mean 'txet'"),
        (b"not json", "broken.jsonl", "cannot be read as jsonl"),
        (b'{"text": 1}\n{"text": 2}\n', "numbers.jsonl", r"column 'text' holds Value\('int64'\), not text"),
        (b'{"text": ["a", "b"]}\n', "lists.jsonl", "column 'text' holds List.*, not text"),
        (b'{"text": "a"}\n{"text": 1}\n', "mixed.jsonl", "column 'text' holds .*, not text"),
        (b'{"text": null}\n', "nulls.jsonl", "column 'text' holds no text"),
        (b"\n\n", "blank.jsonl", "cannot be read as jsonl"),
        (b"PAR", "none.parquet", "cannot be read as parquet"),
        (gzip.compress(b"", mtime=0), "empty.jsonl.gz", "cannot be read as jsonl: nothing is in it"),
        (LINES, "plain.jsonl.gz", "cannot be read as jsonl: Not a gzipped file"),
        (damaged(LINES), "damaged.jsonl.gz", "cannot be read as jsonl: Error -3"),
        (gzip.compress(LINES, mtime=0)[:-20], "cut.jsonl.gz", "cannot be read as jsonl: Compressed file ended"),
        (damaged(LINES), "damaged.txt.gz", "not UTF-8 text: Error -3"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_unusable_files_are_named(tmp_path, content, name, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"train_file=.*{message}"):
        load_texts(train_file=str(path))


def test_data_set_that_cannot_be_loaded_names_the_remedy(tmp_path):
    with pytest.raises(
        ConfigurationError, match="dataset='python-dosc' could not be loaded.*Did you mean 'python-docs'"
    ):
        load_texts(dataset="python-dosc")


def test_data_set_in_a_local_folder_is_loaded_as_from_the_hub(tmp_path):
    write(tmp_path, "train.jsonl", STORIES)
    write(tmp_path, "validation.jsonl", STORIES[:3])
    texts = load_texts(dataset=str(tmp_path))
    assert (len(texts.train), len(texts.validation)) == (40, 3)


def test_data_set_without_training_split_is_named_and_nulls_are_passed_over(tmp_path):
    write(tmp_path, "test.jsonl", STORIES)
    with pytest.raises(ConfigurationError, match=r"has the split\(s\) test; one called train is needed.*--train_file"):
        load_texts(dataset=str(tmp_path))
    write(tmp_path, "train.jsonl", [None, *STORIES, None])
    assert load_texts(dataset=str(tmp_path)).train == STORIES


def test_python_documentation_is_english_and_deterministic():
    documents = python_documentation()
    assert sum(map(len, documents)) > 500_000
    assert any("dictionary" in document for document in documents)
    assert documents == python_documentation()


def test_blocks_hold_every_token_once_with_ends_between_documents(tokenizer):
    blocks = tokenise(STORIES, tokenizer, 16, "training")
    flat = [token for row in blocks["input_ids"] for token in row]
    expected = []
    for story in STORIES:
        expected += [*tokenizer(story)["input_ids"], tokenizer.eos_token_id]
    assert flat == expected[: len(flat)]
    assert 0 <= len(expected) - len(flat) < 16
    assert tokenizer.decode(flat).startswith(STORIES[0] + END_OF_TEXT + STORIES[1])


def test_blocks_are_cached_by_content(tokenizer):
    first, again = tokenise(STORIES, tokenizer, 16, "training"), tokenise(list(STORIES), tokenizer, 16, "training")
    changed = tokenise([*STORIES[:-1], "Another story altogether, long enough for a block."], tokenizer, 16, "training")
    assert first.cache_files == again.cache_files
    assert first.cache_files != changed.cache_files
    assert first[-1] != changed[-1]


def test_text_shorter_than_a_block_is_refused(tokenizer):
    with pytest.raises(ConfigurationError, match=r"the validation text has \d+ tokens, fewer than one block of 512"):
        tokenise(STORIES[:2], tokenizer, 512, "validation")


def test_tokenizer_is_byte_level_and_of_the_size_asked_for(tokenizer, tmp_path):
    text = "Tab\there, naïve 東京 \U0001f600"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 300
    with pytest.raises(ConfigurationError, match="vocab_size=100 must be at least 257"):
        train_tokenizer(STORIES, 100)
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()


def test_tokenizer_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ConfigurationError, match="tokenizer=.*cannot be loaded"):
        load_tokenizer(str(tmp_path / "tokenizer.model"))
    with pytest.raises(ConfigurationError, match="tokenizer=.*cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_sentencepiece_is_named_where_it_is_missing(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr("hf_elra.recipes.text_data.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install sentencepiece"):
        load_tokenizer(str(tmp_path / "tokenizer.model"))


def test_unigram_entropy_in_nats():
    blocks = Dataset.from_dict({"input_ids": [[1, 1, 2, 2], [3, 3, 4, 4]]})
    assert unigram_entropy(blocks) == pytest.approx(math.log(4))
