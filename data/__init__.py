"""Text in, batches out: tasks, their splits as token ids, and batches padded to their longest text.

    load_task("tiny", tokenizer), load_task("cb", tokenizer, data_dir="datasets") or
    load_task("my/folder", tokenizer) -> Task
    task.splits["train"].batch([3, 1, 4]) -> ({input_ids, attention_mask, token_type_ids}, labels)

`data.tiny` generates the embedded benchmark, `data.readers` reads files of your own, `data.corpora` the
paper's. Rows pass one by one, first to be checked, then to be tokenized: no text is kept.
Shapes: N samples, L tokens of the longest sample in the batch.
"""

from array import array
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from data import corpora, readers


@dataclass
class Task:
    """A classification task: encoded splits `train`, `val`, maybe `test`, then any OOD tests."""

    splits: dict  # {name: Split}
    labels: list  # class names, by class index
    metric: str = "accuracy"  # by which epochs are chosen and methods compared; or "matthews"
    pairs: bool = False  # whether a sample is two texts

    @property
    def test_names(self):
        """Names of the splits on which a result is reported: test first, then OOD."""
        return [name for name in self.splits if name not in ("train", "val")]


class Split:
    """Encoded samples, list-like. All token ids lie in one flat array: 5 bytes a token."""

    def __init__(self, examples, pad_token_id):
        """`examples`: an iterable of (input_ids, token_type_ids, label index), lists of one length."""
        ids, types, lengths, labels = array("i"), array("B"), array("q"), array("q")
        for input_ids, token_type_ids, label in examples:
            ids.extend(input_ids)
            types.extend(token_type_ids)
            lengths.append(len(input_ids))
            labels.append(label)
        self.ids, self.types = np.asarray(ids, np.int32), np.asarray(types, np.uint8)  # (all tokens,)
        self.lengths = np.asarray(lengths, np.int64)  # (N,)
        self.starts = np.cumsum(self.lengths) - self.lengths  # (N,)
        self.labels = torch.tensor(np.asarray(labels, np.int64))  # (N,)
        self.pad_token_id = pad_token_id

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        """One sample as a dict of plain lists, and its label."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")  # ends a for loop over the split
        tokens = slice(self.starts[index], self.starts[index] + self.lengths[index])
        return {"input_ids": self.ids[tokens].tolist(),
                "token_type_ids": self.types[tokens].tolist(), "label": int(self.labels[index])}

    def batch(self, indices, multiple_of=1):
        """({input_ids, attention_mask, token_type_ids} each long (N, L), labels (N,)).

        L is the longest sample's length, rounded up to `multiple_of` (but not beyond the split's longest).
        """
        indices = np.asarray(indices)
        longest = min(-(-self.lengths[indices].max() // multiple_of) * multiple_of, self.lengths.max())
        columns = np.arange(longest)
        mask = columns < self.lengths[indices, None]  # (N, L)
        positions = np.where(mask, self.starts[indices, None] + columns, 0)  # (N, L), 0 is unused
        batch = {"input_ids": np.where(mask, self.ids[positions], self.pad_token_id),
                 "attention_mask": mask, "token_type_ids": np.where(mask, self.types[positions], 0)}
        batch = {name: torch.from_numpy(array.astype(np.int64)) for name, array in batch.items()}
        return batch, self.labels[indices]


def training_batches(lengths, batch_size, generator):
    """Index arrays of one epoch: every sample once, neighbours in length together.

    The samples are shuffled and cut into buckets of 8 batches; a bucket is sorted by length and
    cut into batches; the batches are shuffled. Little padding, and still another order each epoch.
    """
    order = torch.randperm(len(lengths), generator=generator).numpy()  # (N,)
    batches = []
    for start in range(0, len(order), 8 * batch_size):
        bucket = order[start:start + 8 * batch_size]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[i:i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def evaluation_batches(lengths, batch_size):
    """Index arrays that cover all samples once, sorted by length."""
    order = np.argsort(lengths, kind="stable")  # (N,)
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]


# ---------------------------------------------------------------------------- tasks


@dataclass
class Rows:
    """A task's texts, read and checked but not kept."""

    splits: dict  # {name: (function that yields (where, text_a, text_b or None, label), wanted rows)}
    indices: dict  # {name: class index of each wanted row, (N,)}
    skipped: dict  # {name of a file: its rows without text}, which only BOSS may have
    labels: dict  # {label in the file: name}, by class index
    metric: str
    pairs: bool
    name: str  # of the task or its folder


def read_task(name_or_directory, data_dir=None):
    """Read every row of a task once, as Rows; ValueError or FileNotFoundError for the first bad one.

    A task without val gives the last tenth of its training rows to validation, unshuffled.
    """
    from data import tiny  # here, so that `python -m data.tiny` does not import it twice

    labels, metric = None, "accuracy"
    if name_or_directory in tiny.TRAIN_SIZES:
        labels = {name: name for name in tiny.LABELS}
        sources = {split: partial(tiny_rows, samples) for split, samples in tiny.load(name_or_directory).items()}
    elif name_or_directory in corpora.CORPORA:
        corpus = corpora.CORPORA[name_or_directory]
        labels, metric = corpus.labels, corpus.metric
        sources = corpora.corpus_sources(name_or_directory, data_dir or "datasets")
    else:
        sources = readers.folder_sources(Path(name_or_directory))
        counts = Counter(label for *_, label in sources["train"]())
        readers.refuse_typos(sources["train"], counts)
        labels = {name: name for name in readers.sort_labels(counts)}
    _, pairs, _ = read_labels(sources["train"], labels, None)
    read = {split: read_labels(source, labels, pairs) for split, source in sources.items()}
    indices = {split: found for split, (found, _, _) in read.items()}
    skipped = {split: count for split, (_, _, count) in read.items() if count}
    splits = {split: (source, np.arange(len(indices[split]))) for split, source in sources.items()}
    if "val" not in splits:
        (source, rows), found = splits["train"], indices["train"]
        kept = len(rows) - len(rows) // 10  # the last tenth, unshuffled
        if len(set(found[kept:])) < 2:
            *_, (where, *_) = source()
            only = [*labels.values()][found[-1]]
            why = (f"a tenth of the {len(rows)} rows is too few for validation; expected 20 rows or more, or "
                   "a val file" if len(rows) < 20 else
                   f"all of the last tenth of the {len(rows)} rows, to be validation, is {only}; put the "
                   "rows in random order or add a val file")
            raise ValueError(f"{where}: the end; there is no val file, and {why}")
        splits["train"], splits["val"] = (source, rows[:kept]), (source, rows[kept:])
        indices["train"], indices["val"] = found[:kept], found[kept:]
    order = dict.fromkeys(name for name in ("train", "val", "test", *splits) if name in splits)
    return Rows({name: splits[name] for name in order}, indices, skipped, labels, metric, pairs,
                str(name_or_directory))


def tiny_rows(samples):
    from data.tiny import LABELS

    for text, label in samples:
        yield "", text, None, LABELS[label]


def read_labels(source, labels, pairs):
    """(class index of each row, whether it is pairs, number of rows without text, which are no rows).

    `pairs`, if not None, says what it has to be.
    """
    index, found, skipped = {label: i for i, label in enumerate(labels)}, array("q"), 0
    for where, text_a, text_b, label in source():
        if text_a is None:
            skipped += 1
            continue
        pairs = text_b is not None if pairs is None else pairs
        if (text_b is not None) != pairs:
            raise ValueError(f"{where}: {'one text' if pairs else 'two texts'}, where the first training row has "
                             f"{'two' if pairs else 'one'}")
        if label not in index:
            raise ValueError(f"{where}: label {label[:60]!r}; expected one of {readers.listing(labels)}")
        found.append(index[label])
    if not found:
        raise ValueError(f"{source.args[0]}, line 1: no rows of text up to the end of the file")
    if len(index) < 2:
        raise ValueError(f"{where}: the end of the file; {label!r} is its only label, expected two or more")
    return np.asarray(found, np.int64), pairs, skipped


def load_task(name_or_directory, tokenizer, max_length=128, data_dir=None, max_train=None, seed=0, max_test=None):
    """A Task by name (tiny, tiny-plain, or one of corpora.CORPORA below data_dir), or of a folder.

    max_train keeps that many training samples, drawn with `seed`, in their original order; max_test as many
    of test and of each OOD split, the same for every seed, and with 0 the task has neither. Instead of a name,
    Rows that read_task has checked. Raises ValueError or FileNotFoundError that names the file, the line and
    what was expected.
    """
    rows = name_or_directory
    if not isinstance(rows, Rows):
        rows = read_task(name_or_directory, data_dir)
    splits, names = dict(rows.splits), list(rows.labels.values())
    for name, (source, wanted) in rows.splits.items():
        if name == "train":
            splits[name] = source, draw(wanted, max_train, seed)
        elif name != "val":
            splits[name] = source, draw(wanted, max_test, 0)
            if max_test == 0:
                del splits[name]
    refuse_missing_classes(rows, splits["train"][1])
    index = {label: i for i, label in enumerate(rows.labels)}
    encoded = {name: encode(tokenizer, pick(source, wanted, index), max_length)
               for name, (source, wanted) in splits.items()}
    return Task(encoded, names, rows.metric, rows.pairs)


def refuse_missing_classes(rows, train, how=""):
    """ValueError if one of the classes has none of the training rows of these numbers; `how` they came about."""
    names = list(rows.labels.values())
    missing = set(range(len(names))) - set(rows.indices["train"][train].tolist())
    if missing:
        raise ValueError(f"{rows.name}: the {len(train)} training samples{how} have no "
                         f"{readers.listing([names[i] for i in sorted(missing)])}; every class needs samples there")


def draw(wanted, most, seed):
    """At most that many of the row numbers, drawn with `seed`, in their order; all of them if None."""
    if most is None or most >= len(wanted):
        return wanted
    generator = torch.Generator().manual_seed(seed)
    return wanted[torch.randperm(len(wanted), generator=generator)[:most].sort().values.numpy()]


def pick(source, wanted, index):
    """Yield (text_a, text_b or None, class index) of the rows whose numbers are in `wanted`, rising."""
    wanted = iter(wanted.tolist())
    following = next(wanted, None)
    for number, (_, text_a, text_b, label) in enumerate(row for row in source() if row[1] is not None):
        if number == following:
            yield text_a, text_b, index[label]
            following = next(wanted, None)


def count_unknown(tokenizer, split, pairs):
    """(tokens of a Split that stand for words which the tokenizer does not know, all but special ones)."""
    unknown = getattr(tokenizer.model, "unk_token", None)  # such as [UNK]; None where it knows every word
    special = len(split) * tokenizer.num_special_tokens_to_add(pairs)
    return int((split.ids == tokenizer.token_to_id(unknown or "")).sum()), len(split.ids) - special


def encode(tokenizer, rows, max_length):
    """Tokenize an iterable of (text_a, text_b or None, class index); pairs are cut longest first."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    pad_token_id = next((i for i in map(tokenizer.token_to_id, ("[PAD]", "<pad>")) if i is not None),
                        0)

    def examples(rows):
        while chunk := list(islice(rows, 1000)):
            texts = [a if b is None else (a, b) for a, b, _ in chunk]
            for encoding, (*_, label) in zip(tokenizer.encode_batch(texts), chunk):
                yield encoding.ids, encoding.type_ids, label

    return Split(examples(iter(rows)), pad_token_id)
