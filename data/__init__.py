"""Text in, batches out: tasks, their splits as token ids, and batches padded to their longest text.

    load_task("tiny", tokenizer), load_task("cb", tokenizer, data_dir="datasets") or
    load_task("my/folder", tokenizer) -> Task
    task.splits["train"].batch([3, 1, 4]) -> ({input_ids, attention_mask, token_type_ids}, labels)

`data.tiny` generates the embedded benchmark, `data.readers` reads files of your own, `data.corpora` the
paper's.
Shapes: N samples, L tokens of the longest sample in the batch.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data import corpora, readers


@dataclass
class Task:
    """A classification task: splits `train`, `val`, maybe `test`, then any OOD tests."""

    splits: dict  # {name: Split}; from read_task {name: [(text_a, text_b or None, class index), ...]}
    labels: list  # class names, by class index
    metric: str = "accuracy"  # by which epochs are chosen and methods compared; or "matthews"
    pairs: bool = False  # whether a sample is two texts
    skipped: dict = field(default_factory=dict)  # {name of a file: its rows without text}, only BOSS may have
    name: str = ""

    @property
    def test_names(self):
        """Names of the splits on which a result is reported: test first, then OOD."""
        return [name for name in self.splits if name not in ("train", "val")]


class Split:
    """Encoded samples. All token ids lie in one flat array: 5 bytes a token."""

    def __init__(self, examples, pad_token_id):
        """`examples`: an iterable of (input_ids, token_type_ids, label index), lists of one length."""
        ids, types, labels = zip(*((np.array(i, np.int32), np.array(t, np.uint8), y) for i, t, y in examples))
        self.ids, self.types = np.concatenate(ids), np.concatenate(types)  # (all tokens,)
        self.lengths = np.array([len(i) for i in ids])  # (N,)
        self.starts = np.cumsum(self.lengths) - self.lengths  # (N,)
        self.labels = torch.tensor(labels)  # (N,)
        self.pad_token_id = pad_token_id

    def __len__(self):
        return len(self.lengths)

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

    def batches(self, indices, batch_size):
        """(batches of these samples, by length: little padding; each sample's place in them, (N,))."""
        order = evaluation_batches(self.lengths[indices], batch_size)
        return [self.batch(indices[part])[0] for part in order], np.concatenate(order).argsort()


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


def read_task(name_or_directory, data_dir=None, language=None):
    """Read a task's texts; ValueError or FileNotFoundError for the first bad row.

    `language`: of the embedded tasks (default: that of the shipped encoder). A task without val gives the
    last tenth of its training rows to validation, unshuffled.
    """
    from data import tiny  # here, so that `python -m data.tiny` does not import it twice

    labels, metric = None, "accuracy"
    if name_or_directory in tiny.TASKS:
        labels = {name: name for name in tiny.LABELS}
        texts = tiny.load(name_or_directory, tiny.LANGUAGE if language is None else language)
        sources = {split: lambda samples=samples: [("", text, None, tiny.LABELS[i]) for text, i in samples]
                   for split, samples in texts.items()}
    elif name_or_directory in corpora.CORPORA:
        corpus = corpora.CORPORA[name_or_directory]
        labels, metric = corpus.labels, corpus.metric
        sources = corpora.corpus_sources(name_or_directory, data_dir or "datasets")
    else:
        sources = readers.folder_sources(Path(name_or_directory))
    rows, skipped = {}, {}
    for split, source in sources.items():
        all_rows = list(source())  # (where, text_a, text_b or None, label); text_a is None: skip
        rows[split] = [row for row in all_rows if row[1] is not None]
        if len(rows[split]) < len(all_rows):
            skipped[split] = len(all_rows) - len(rows[split])
        if not rows[split]:
            raise ValueError(f"{source.args[0]}, line 1: the file has no rows of text")
    if labels is None:
        readers.refuse_typos(rows["train"])
        labels = {name: name for name in readers.sort_labels({label for *_, label in rows["train"]})}
        if len(labels) > max(20, len(rows["train"]) / 2):
            raise ValueError(f"{rows['train'][0][0]}: {len(labels)} different labels in {len(rows['train'])} "
                             f"rows, such as {readers.listing([*labels][:2])}; are text and label swapped?")
    if len(labels) < 2:
        raise ValueError(f"{rows['train'][-1][0]}: the end of the file; {[*labels][0]!r} is its only label, "
                         "expected two or more")
    pairs = rows["train"][0][2] is not None
    splits = {split: check_rows(rows[split], labels, pairs) for split in rows}
    if "val" not in splits:
        kept = len(splits["train"]) - len(splits["train"]) // 10
        splits["train"], splits["val"] = splits["train"][:kept], splits["train"][kept:]
        if len({index for *_, index in splits["val"]}) < 2:
            raise ValueError(f"{rows['train'][-1][0]}: the end; there is no val file, and the last tenth of "
                             f"{len(rows['train'])} rows, to be validation, has fewer than two classes; put "
                             "the rows in random order, or add rows or a val file")
    order = dict.fromkeys(name for name in ("train", "val", "test", *splits) if name in splits)
    return Task({name: splits[name] for name in order}, [*labels.values()], metric, pairs, skipped,
                str(name_or_directory))


def check_rows(rows, labels, pairs):
    """[(text_a, text_b or None, class index), ...] of rows (where, text_a, text_b or None, label)."""
    index, checked = {label: i for i, label in enumerate(labels)}, []
    for where, text_a, text_b, label in rows:
        if (text_b is not None) != pairs:
            raise ValueError(f"{where}: {'one text' if pairs else 'two texts'}, where the first training row "
                             f"has {'two' if pairs else 'one'}")
        if label not in index:
            raise ValueError(f"{where}: label {label[:60]!r}; expected one of {readers.listing(labels)}")
        checked.append((text_a, text_b, index[label]))
    return checked


def load_task(name_or_directory, tokenizer, max_length=128, data_dir=None, max_train=None, seed=0,
              max_test=None, language=None):
    """A Task by name (one of tiny.TASKS, or of corpora.CORPORA below data_dir), or of a folder.

    max_train keeps that many training samples, drawn with `seed`, in their original order; max_test as many
    of test and of each OOD split, the same for every seed, and with 0 the task has neither. Instead of a
    name, what read_task has read. Raises what read_task raises, and ValueError if no training sample of a
    class is left.
    """
    task = name_or_directory
    if not isinstance(task, Task):
        task = read_task(name_or_directory, data_dir, language)
    train = draw(task.splits["train"], max_train, seed)
    if missing := set(range(len(task.labels))) - {index for *_, index in train}:
        names = readers.listing([task.labels[i] for i in sorted(missing)])
        how = f" drawn with seed {seed}" * (max_train is not None)
        raise ValueError(f"{task.name}: the {len(train)} training samples{how} have no {names}; "
                         "every class needs samples there")
    splits = {"train": train, "val": task.splits["val"]}
    splits |= {name: draw(task.splits[name], max_test, 0) for name in task.test_names if max_test != 0}
    task.splits = {name: encode(tokenizer, split, max_length) for name, split in splits.items()}
    return task


def draw(rows, most, seed):
    """At most that many of the rows, drawn with `seed`, in their order; all of them if None."""
    if most is None or most >= len(rows):
        return rows
    generator = torch.Generator().manual_seed(seed)
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)[:most].sort().values.tolist()]


def draw_ntk_samples(count, seed, task):
    """{split: indices} of kernel samples, drawn with `seed`: of train, and of test or else val.

    ValueError where a class has fewer than 5 of the training samples: kernel regression cross-validates.
    """
    generator, drawn = torch.Generator().manual_seed(seed), {}
    for name in ("train", "test" if "test" in task.splits else "val"):
        drawn[name] = torch.randperm(len(task.splits[name]), generator=generator)[:count].numpy()
    counts = task.splits["train"].labels[drawn["train"]].bincount(minlength=len(task.labels))
    if counts.min() < 5:
        raise ValueError(f"--ntk {count}: the {counts.sum()} training samples drawn with seed {seed} have "
                         f"{counts.min()} of class {task.labels[counts.argmin()]}; kernel regression needs 5 "
                         "of each, so a larger N or more data")
    return drawn


def count_unknown(tokenizer, split, pairs):
    """(tokens of a Split that stand for words which the tokenizer does not know, all but special ones)."""
    unknown = getattr(tokenizer.model, "unk_token", None)  # such as [UNK]; None where it knows every word
    special = len(split) * tokenizer.num_special_tokens_to_add(pairs)
    return int((split.ids == tokenizer.token_to_id(unknown or "")).sum()), len(split.ids) - special


def encode(tokenizer, rows, max_length):
    """Tokenize a list of (text_a, text_b or None, class index); pairs are cut longest first."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    pad_token_id = next((i for i in map(tokenizer.token_to_id, ("[PAD]", "<pad>")) if i is not None), 0)

    def examples():
        for start in range(0, len(rows), 1000):  # what the tokenizer gives takes 100 times the ids' memory
            chunk = rows[start:start + 1000]
            texts = [a if b is None else (a, b) for a, b, _ in chunk]
            for encoding, (*_, label) in zip(tokenizer.encode_batch(texts), chunk):
                yield encoding.ids, encoding.type_ids, label

    return Split(examples(), pad_token_id)
