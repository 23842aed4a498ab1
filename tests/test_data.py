"""From files and from the grammar to padded batches."""

import json
import random
from collections import Counter
import subprocess

import pytest
import torch

from conftest import sample
from data import Task, draw_ntk_samples, encode, evaluation_batches, load_task, read_task, readers, tiny, training_batches
from plumbing.checkpoint import load_pretrained


@pytest.fixture
def tokenizer():
    return tiny.make_tokenizer()


def write_rows(path, rows):
    """Rows (dicts) as .jsonl, .csv or .tsv, without quoting."""
    if path.suffix == ".jsonl":
        lines = [json.dumps(row) for row in rows]
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [mark.join(rows[0])] + [mark.join(map(str, row.values())) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


ROWS = [{"text": f"the screen was {word}", "label": label} for word, label in
        [("good", "pos"), ("bad", "neg")] * 10]

# ------------------------------------------------------------------------------------ the language


def test_the_same_seed_is_the_same_language():
    assert tiny.load("tiny", language=3) == tiny.load("tiny", language=3)
    assert tiny.load("tiny", language=3) != tiny.load("tiny", language=4)


def test_every_generated_word_has_a_token(tokenizer):
    texts = [text for task in tiny.TASKS for rows in tiny.load(task).values() for text, _ in rows]
    unknown = tokenizer.token_to_id("[UNK]")
    assert all(unknown not in e.ids for e in tokenizer.encode_batch(texts + tiny.Language().documents(500)))


def test_only_the_first_domain_is_trained_on():
    """A word of domain 0 alone is in the training texts, one of the others is not."""
    words = {word for text, _ in tiny.load("tiny")["train"] for word in text.split()}
    assert words & set(tiny.NOUNS[0])
    for domain in (1, 2, 3):
        assert not words & set(tiny.NOUNS[domain] + tiny.ENTITIES[domain])


@pytest.mark.parametrize("task, count", [("tiny-30", 30), ("tiny", 60), ("tiny-120", 120)])
def test_few_labels_are_as_many_of_each_class(task, count):
    """Else a class may be nearly absent from 30 texts, and which one would be luck."""
    splits = tiny.load(task)
    assert Counter(label for _, label in splits["train"]) == dict.fromkeys(range(3), count // 3)
    assert {split: len(texts) for split, texts in splits.items()} == {
        "train": count, "val": 200, "test": 500, "films": 500, "hotels": 500, "meals": 500}


def test_tiny_distractors_has_two_distractor_sentences_and_tiny_has_none():
    for task, expected in (("tiny-distractors", 2), ("tiny", 0)):
        for text, _ in tiny.load(task)["val"]:
            sentences = text.split(" . ")
            about_shared = sum(any(w in tiny.SHARED_NOUNS for w in s.split()) for s in sentences)
            assert about_shared == expected, text


def test_a_negation_turns_an_adjective_into_the_opposite_mood():
    """Without the negation share, moods and adjectives agree; "not" only precedes the opposite."""
    language, rng = tiny.Language(), random.Random(0)
    good = set(tiny.SHARED_ADJECTIVES[tiny.POSITIVE] + tiny.ADJECTIVES[0][tiny.POSITIVE])
    phrases = [language.adjective_phrase(rng, 0, tiny.NEGATIVE).split() for _ in range(500)]
    negated = [p for p in phrases if p[0] in ("not", "never")]
    assert 0.08 < len(negated) / 500 < 0.17
    assert all(p[-1] in good for p in negated)
    assert not any(set(p) & good for p in phrases if p not in negated)


# ------------------------------------------------------------------------------------ batches


def test_a_batch_holds_the_samples_and_padding(tokenizer):
    split = encode(tokenizer, [("good", None, 2), ("the screen was bad", None, 0)], 128)
    batch, labels = split.batch([1, 0])
    assert labels.tolist() == [0, 2]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert batch["input_ids"][1].tolist() == sample(split, 0)["input_ids"] + [0, 0, 0]
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_a_pair_is_cut_longest_first_and_its_second_text_is_marked(tokenizer):
    long, short = "the screen was bad . " * 10, "good"
    example = sample(encode(tokenizer, [(long, short, 0)], 12), 0)
    words = [tokenizer.id_to_token(i) for i in example["input_ids"]]
    assert words == ["[CLS]", *long.split()[:8], "[SEP]", "good", "[SEP]"]
    assert example["token_type_ids"] == [0] * 10 + [1] * 2
    example = sample(encode(tokenizer, [(short, long, 0)], 12), 0)  # whichever of the two is long
    words = [tokenizer.id_to_token(i) for i in example["input_ids"]]
    assert words == ["[CLS]", "good", "[SEP]", *long.split()[:8], "[SEP]"]
    assert example["token_type_ids"] == [0] * 3 + [1] * 9


def test_an_epoch_sees_every_sample_once_and_pads_little():
    lengths = torch.randint(5, 100, (333,), generator=torch.Generator().manual_seed(0)).numpy()
    batches = training_batches(lengths, 16, torch.Generator().manual_seed(1))
    assert sorted(i for batch in batches for i in batch) == list(range(333))
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.15 * lengths.sum()
    again = training_batches(lengths, 16, torch.Generator().manual_seed(1))
    other = training_batches(lengths, 16, torch.Generator().manual_seed(2))
    assert all((a == b).all() for a, b in zip(batches, again))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(batches, other))
    assert sorted(i for batch in evaluation_batches(lengths, 16) for i in batch) == list(range(333))


def test_rounding_up_a_batch_stays_within_the_split_and_pads_with_zeros(tokenizer):
    """Or the encoder might lack a position; types of padding are 0, as transformers has them."""
    split = encode(tokenizer, [("good", "bad", 0), ("the screen was", "good .", 1), ("good", "bad", 2)], 128)
    assert split.lengths.tolist() == [5, 8, 5]
    assert split.batch([0], multiple_of=4)[0]["input_ids"].shape == (1, 8)
    assert split.batch([1], multiple_of=16)[0]["input_ids"].shape == (1, 8)  # the longest there is
    batch, _ = split.batch([0, 1])
    padding = batch["attention_mask"] == 0
    assert padding.sum() == 3 and (batch["token_type_ids"][padding] == 0).all()
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]


def test_the_kernel_needs_five_samples_of_each_class(tokenizer):
    for count, enough in ((5, True), (4, False)):
        task = Task({name: encode(tokenizer, [("good", None, i % 2) for i in range(40)], 8)
                     for name in ("train", "val")}, ["no", "yes"])
        drawn = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:20]
        task.splits["train"].labels[:] = 0
        task.splits["train"].labels[drawn[:count]] = 1
        if enough:
            assert len(draw_ntk_samples(20, 0, task)["train"]) == 20
        else:
            with pytest.raises(ValueError, match="have 4 of class yes; kernel regression needs 5 of each"):
                draw_ntk_samples(20, 0, task)


def test_an_epoch_shuffles_the_samples_and_then_the_batches():
    """Two epochs put other samples together, and batches do not come as they were cut, by length."""
    lengths = torch.randint(5, 100, (333,), generator=torch.Generator().manual_seed(0)).numpy()
    one, two = (training_batches(lengths, 4, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    together = [{frozenset(batch.tolist()) for batch in batches} for batches in (one, two)]
    assert len(together[0] & together[1]) < 5
    longest = [lengths[batch].max() for batch in one]
    falls = sum(b < a for a, b in zip(longest, longest[1:]))
    assert 0.3 < falls / len(longest) < 0.7  # one in eight if only the buckets were cut


# ------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
def test_a_folder_of_your_own(tmp_path, tokenizer, suffix):
    """Labels are sorted by name; without val the last tenth of train is validation, unshuffled."""
    write_rows(tmp_path / f"train{suffix}", ROWS)
    write_rows(tmp_path / f"test{suffix}", ROWS[:3])
    write_rows(tmp_path / f"ood_forum{suffix}", ROWS[:4])
    task = load_task(tmp_path, tokenizer)
    assert task.labels == ["neg", "pos"]
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 18, "val": 2, "test": 3, "forum": 4}
    assert task.test_names == ["test", "forum"]
    assert task.splits["val"].labels.tolist() == [1, 0]
    assert [tokenizer.id_to_token(i) for i in sample(task.splits["val"], 1)["input_ids"]][-2] == "bad"


@pytest.mark.parametrize("name", ["val", "dev", "validation"])
def test_other_names_of_validation_and_text(tmp_path, name):
    """As many published data sets have them."""
    rows = [{"sentence" if name == "dev" else "text": row["text"], "label": row["label"]} for row in ROWS]
    write_rows(tmp_path / "train.tsv", rows)
    write_rows(tmp_path / f"{name}.tsv", rows[:4])
    found = read_task(tmp_path)
    assert {split: len(samples) for split, samples in found.splits.items()} == {"train": 20, "val": 4}
    assert [row[0] for row in found.splits["val"]] == [row["text"] for row in ROWS[:4]]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_the_command_that_a_file_in_another_encoding_gets_converts_it(tmp_path, encoding):
    path = tmp_path / "train.csv"
    path.write_bytes("text,label\nA “café”,a\n".encode(encoding))
    with pytest.raises(ValueError, match="not UTF-8 text") as refused:
        list(readers.read_rows(path))
    command = str(refused.value).split(", ")[-1].removesuffix(" converts it")
    subprocess.run(["bash", "-c", command.replace("FILE", str(path)).replace("NEW", str(tmp_path / "new.csv"))], check=True)
    assert [row[1:] for row in readers.read_rows(tmp_path / "new.csv")] == [("A “café”", None, "a")]


def test_integer_labels_are_sorted_as_numbers():
    assert readers.sort_labels({"10", "9", "-1"}) == ["-1", "9", "10"]
    assert readers.sort_labels({"1", "01", "0"}) == ["0", "01", "1"]  # the same in every run


def test_pairs_byte_order_mark_quotes_and_windows_line_ends(tmp_path):
    text = '\ufeffText_A,text_b,LABEL\r\n"a ""b"", c\nd",e,0\r\nf,g,1\r\n'
    (tmp_path / "x.csv").write_bytes(text.encode())
    rows = [row[1:] for row in readers.read_rows(tmp_path / "x.csv")]
    assert rows == [('a "b", c\nd', "e", "0"), ("f", "g", "1")]


def test_max_train_keeps_a_seeded_sample_in_the_original_order(tmp_path, tokenizer):
    rows = [{"text": f"{word}", "label": i % 2} for i, word in enumerate(tiny.vocabulary()[0][-40:])]
    write_rows(tmp_path / "train.jsonl", rows)

    def kept(seed):
        split = load_task(tmp_path, tokenizer, max_train=8, seed=seed).splits["train"]
        return split.batch(range(8))[0]["input_ids"][:, 1].tolist()

    assert len(kept(0)) == 8 and kept(0) == sorted(kept(0)) and kept(0) == kept(0) != kept(1)


def test_max_test_keeps_the_same_rows_of_each_test_for_every_seed(tmp_path, tokenizer):
    """0 takes the test splits away: what chooses hyper-parameters cannot see them."""
    rows = [{"text": f"{word}", "label": i % 2} for i, word in enumerate(tiny.vocabulary()[0][-40:])]
    for name in ("train", "val", "test", "ood_forum"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    kept = [load_task(tmp_path, tokenizer, max_test=8, seed=seed).splits for seed in (0, 1)]
    assert {name: len(split) for name, split in kept[0].items()} == {"train": 40, "val": 40, "test": 8, "forum": 8}
    for name in ("test", "forum"):
        first, second = (splits[name].batch(range(8))[0]["input_ids"][:, 1].tolist() for splits in kept)
        assert first == second == sorted(first)
    assert load_task(tmp_path, tokenizer, max_test=0).test_names == []


def test_cb_and_rte_in_their_original_layout(superglue, minilm):
    """SuperGLUE's val.jsonl is the test set; validation is the last tenth of train."""
    _, tokenizer = load_pretrained(minilm)
    cb, rte = (load_task(name, tokenizer, data_dir=superglue) for name in ("cb", "rte"))
    assert {name: len(split) for name, split in cb.splits.items()} == {"train": 225, "val": 25, "test": 56}
    assert {name: len(split) for name, split in rte.splits.items()} == {
        "train": 2241, "val": 249, "test": 277}
    assert cb.labels == ["contradiction", "entailment", "neutral"]
    lines = (superglue / "CB" / "val.jsonl").read_text().splitlines()
    row = json.loads(lines[5])
    assert cb.labels[cb.splits["test"].labels[5]] == row["label"]
    assert sample(cb.splits["test"], 5)["input_ids"] == tokenizer.encode(row["premise"], row["hypothesis"]).ids


BAD_FILES = [
    ("train.csv", b"text,label\nfine,0\n\xff\xfe,1\n", "line 3: not UTF-8"),
    ("train.csv", b"text,label\nfine,0\ngood,1,2\n", "line 3: 3 columns"),
    ("train.csv", b"text,label\nfine,0\n,1\n", "line 3: text is ''"),
    ("train.csv", b"text,label\nfine,0\ngood,\n", "line 3: label is ''"),
    ("train.csv", b'text,label\nfine,0\n"good,1\n', "line 3: a quote .* is never closed"),
    ("train.csv", b"review,label\nfine,0\n", "line 1: .* is: review, label; expected text"),
    ("train.csv", b"text,class\nfine,0\n", "line 1: .* is: text, class; expected text .* and label"),
    ("train.csv", b"", "line 1: the file has no rows"),
    ("train.csv", b"text,label\nfine,0\ngood,0\n", "line 3: the end of the file; '0' is its only label"),
    ("train.csv", b"text,label\nfine,0\ngood,1\n", "line 3: the end; .* fewer than two classes"),
    ("train.jsonl", b'{"text": "a", "label": 0}\n{"text": \n', "line 2: not JSON"),
    ("train.jsonl", b'["a", 0]\n', "line 1: expected one JSON object a line"),
    ("train.jsonl", b'{"text": 5, "label": 0}\n', "line 1: text is 5"),
    ("train.jsonl", b'{"text": "a", "label": 0.5}\n', "line 1: label is 0.5"),
    ("train.jsonl", b'{"text": "a", "label": null}\n', "line 1: label is None"),
]


@pytest.mark.parametrize("name, content, message", BAD_FILES)
def test_a_broken_file_is_refused_with_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_task(tmp_path)
    assert name in str(caught.value)


@pytest.mark.parametrize("odd, frequent, refused", [
    ("postive", "positive", True), ("World", "world", True), ("poss", "pos", True),
    ("tv news", "tv_news", True),
    ("class 1", "class 2", False), ("11", "1", False), ("neutral", "negative", False),
    ("entailment", "not_entailment", False)])
def test_a_label_that_looks_like_a_typo_is_named_with_its_text(tmp_path, odd, frequent, refused):
    """It would be a class of one text. Numbers are no typos of each other, and twice is no accident."""
    rows = [{"text": "x", "label": frequent}, {"text": "y", "label": "other"}] * 20
    write_rows(tmp_path / "train.jsonl", rows[:7] + [{"text": "the odd one", "label": odd}] + rows[7:])
    if refused:
        said = f"train.jsonl, line 8: label '{odd}' .* 'the odd one', and '{frequent}' 20"
        with pytest.raises(ValueError, match=said):
            read_task(tmp_path)
    else:
        assert odd in read_task(tmp_path).labels
    write_rows(tmp_path / "train.jsonl", rows + [{"text": "the odd one", "label": odd}] * 2 + rows)
    assert odd in read_task(tmp_path).labels


def test_a_rare_label_is_no_pattern_for_typos(tmp_path):
    """Beside one that occurs 4 times, a single similar one may be a class of its own; beside 5, it is refused."""
    for count in (4, 5):
        labels = ["positive"] * count + ["other"] * 20 + ["postive"] + ["other", "neither"] * 2
        write_rows(tmp_path / "train.jsonl", [{"text": "x", "label": label} for label in labels])
        if count == 4:
            assert "postive" in read_task(tmp_path).labels
    with pytest.raises(ValueError, match="label 'postive' occurs once"):
        read_task(tmp_path)


def test_a_label_that_training_does_not_know_is_refused(tmp_path):
    write_rows(tmp_path / "train.tsv", ROWS)
    write_rows(tmp_path / "test.tsv", [{"text": "x", "label": "mixed"}])
    with pytest.raises(ValueError, match=r"test.tsv, line 2: label 'mixed'.*neg, pos"):
        read_task(tmp_path)


def test_a_folder_without_training_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_task(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no train.tsv"):
        read_task(tmp_path)


def test_a_class_that_max_train_leaves_out_is_an_error(tmp_path, tokenizer):
    write_rows(tmp_path / "train.tsv", ROWS)
    with pytest.raises(ValueError, match="1 training samples drawn with seed 0 have no"):
        load_task(tmp_path, tokenizer, max_train=1)
