"""Whatever stands in a file, reading it ends in data or in one line of ValueError that names the file."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plumbing.checkpoint import read_safetensors, read_tokenizer, write_safetensors
from plumbing.files import read_json
from data import encode, readers, tiny
from data.corpora import CORPORA
from plumbing.export import load_classifier
from predict import read_texts
from plumbing.files import load_tensors, save_tensors

FEW, MANY = 50, 2000  # cases of each test: in the suite, in the slow suite
ALPHABET = st.sampled_from(["text", "label", "text_a", "a", "b", "\t", ",", '"', "\n", "\r", "\r\n", " ", "\ufeff", "\0", "é",
                            "{", "}", "[", ":", "\\ud800", "\\", "null", "0", "-1", "1e999", "\u2028", "𝄞"])
TEXT = st.one_of(st.lists(ALPHABET, max_size=40).map("".join), st.text(max_size=200))
BYTES = st.one_of(TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")), st.binary(max_size=300))
JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
                    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(
                        st.sampled_from(["text", "label", "text_a", "text_b", "premise", "hypothesis", "x"]), inner,
                        max_size=4)), max_leaves=8)
DATA = st.one_of(BYTES, BYTES.map(lambda b: b"text,label\nfirst,a\n" + b), BYTES.map(lambda b: b"text\tlabel\nfirst\ta\n" + b),
                 st.lists(JSON, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()))


def both(test):
    """The test twice: with FEW cases in the suite, with MANY among the slow ones."""
    return pytest.mark.parametrize("cases", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])(test)


def fuzz(cases, check, *strategies):
    run = given(*strategies)(check)
    settings(max_examples=cases, deadline=None, derandomize=True, database=None,
             suppress_health_check=list(HealthCheck))(run)()


def refused_or_read(path, read):
    """What read() gives, or None after a refusal in one line with the file's name."""
    try:
        return read()
    except (ValueError, FileNotFoundError) as error:
        assert type(error) in (ValueError, FileNotFoundError) and str(path) in str(error), repr(error)
        assert len(str(error).splitlines()) == 1, repr(error)


@both
@pytest.mark.parametrize("suffix", readers.FORMATS)
def test_your_own_files(suffix, cases, tmp_path):
    path = tmp_path / f"train{suffix}"

    def check(content):
        path.write_bytes(content)
        for where, text_a, text_b, label in refused_or_read(path, lambda: list(readers.read_rows(path))) or ():
            assert str(path) in where and text_a.strip() and label == label.strip() != ""
            assert text_b is None or text_b.strip()

    fuzz(cases, check, DATA)


@both
@pytest.mark.parametrize("name", CORPORA)
def test_files_of_the_papers_data_sets(name, cases, tmp_path):
    line = json.dumps({"premise": "p", "hypothesis": "h", "question": "q", "passage": "p", "label": 0, "word": "w",
                       "sentence1": "w x", "sentence2": "w y", "text": "a b", "target": {"span1_index": 0}}).encode()
    path = tmp_path / "file"

    def check(content):
        path.write_bytes(content)
        for where, text_a, _, label in refused_or_read(path, lambda: list(CORPORA[name].read(path))) or ():
            assert str(path) in where
            assert text_a.strip() and isinstance(label, str) if text_a is not None else name == "amazon"

    fuzz(cases, check, st.one_of(DATA, BYTES.map(lambda b: line + b"\n" + b)))


@both
def test_safetensors(cases, tmp_path):
    """Damage to a good file, headers made of JSON, and plain noise."""
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(4, dtype=torch.int64)})
    good = path.read_bytes()
    entry = st.fixed_dictionaries({}, optional={
        "dtype": st.one_of(st.sampled_from(["F32", "I64", "F8", "BOOL"]), JSON),
        "shape": st.one_of(st.lists(st.integers(-2, 2**65), max_size=4), JSON),
        "data_offsets": st.one_of(st.lists(st.integers(-9, 99), min_size=2, max_size=2), JSON)})
    header = st.dictionaries(st.text(max_size=4), st.one_of(entry, JSON), max_size=3).map(
        lambda h: (lambda head: len(head).to_bytes(8, "little") + head + bytes(40))(json.dumps(h).encode()))
    damaged = st.tuples(st.integers(0, len(good) - 1), st.binary(max_size=9)).map(
        lambda where: good[:where[0]] + where[1] + good[where[0] + len(where[1]):])

    def check(content):
        path.write_bytes(content)
        for tensor in (refused_or_read(path, lambda: read_safetensors(path)) or {}).values():
            assert tensor.numel() * tensor.element_size() <= len(content)

    fuzz(cases, check, st.one_of(damaged, header, st.binary(max_size=200)))


@both
def test_json_and_tokenizers(cases, tmp_path):
    path = tmp_path / "tokenizer.json"
    good = tiny.make_tokenizer().to_str()
    damaged = st.tuples(st.integers(0, len(good) - 1), TEXT).map(
        lambda where: (good[:where[0]] + where[1] + good[where[0] + len(where[1]):]).encode("utf-8", "replace"))

    def check(content):
        path.write_bytes(content)
        assert isinstance(refused_or_read(path, lambda: read_json(path)), dict | None)
        refused_or_read(path, lambda: read_tokenizer(path, 282))

    fuzz(cases, check, st.one_of(damaged, DATA))


@both
def test_texts_to_token_ids(cases):
    """Any text, alone or in a pair, becomes ids of the vocabulary, cut to the length, and a batch of them."""
    tokenizer = tiny.make_tokenizer()

    def check(texts, length):
        split = encode(tokenizer, [(a or "x", b, 0) for a, b in texts], length)
        assert (split.lengths <= length).all() and (split.ids < tokenizer.get_vocab_size()).all()
        batch, labels = split.batch(range(len(split)))
        assert batch["input_ids"].shape == batch["attention_mask"].shape and len(labels) == len(texts)

    pair = st.lists(st.tuples(TEXT.filter(lambda t: "\ud800" not in t), TEXT), min_size=1, max_size=5)
    single = st.lists(st.tuples(TEXT, st.none()), min_size=1, max_size=5)
    fuzz(cases, check, st.one_of(single, pair), st.integers(8, 128))


@both
def test_lines_for_predict(cases):
    def check(content, pairs):
        refused_or_read("standard input", lambda: list(read_texts(content.splitlines(keepends=True), "standard input",
                                                                  pairs)))

    fuzz(cases, check, BYTES, st.booleans())


@both
def test_states_and_run_folders(cases, tmp_path):
    """A state that is not whole is never read; a classifier.json of anything is refused or has its parts."""
    path = tmp_path / "state"
    save_tensors(path, {"start": {}, "x": torch.ones(3), "step": 4})
    good = path.read_bytes()
    write_safetensors(tmp_path / "model.safetensors", {})
    content_of = tmp_path / "classifier.json"

    def check(where, noise, content):
        damaged = good[:where] + noise + good[where + len(noise):]
        path.write_bytes(damaged)
        assert refused_or_read(path, lambda: load_tensors(path)) is None or damaged == good
        content_of.write_bytes(content)
        assert refused_or_read(tmp_path, lambda: load_classifier(tmp_path)) is None

    fuzz(cases, check, st.integers(0, len(good) - 1), st.binary(max_size=9), DATA)
