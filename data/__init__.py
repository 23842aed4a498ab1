"""Text in, batches out: tasks, their splits as token ids, and batches padded to their longest text.

    load_task("tiny", tokenizer) or load_task("my/folder", tokenizer) -> Task
    task.splits["train"].batch([3, 1, 4]) -> ({input_ids, attention_mask, token_type_ids}, labels)

`data.tiny` generates the embedded benchmark, `data.readers` reads files.
Shapes: N samples, L tokens of the longest sample in the batch.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import readers


@dataclass
class Task:
    """A classification task: encoded splits `train`, `val`, maybe `test`, then any OOD tests."""

    splits: dict  # {name: Split}
    labels: list  # class names, by class index

    @property
    def test_names(self):
        """Names of the splits on which a result is reported: test first, then OOD."""
        return [name for name in self.splits if name not in ("train", "val")]


class Split:
    """Encoded samples, list-like. All token ids lie in one flat array: 5 bytes a token."""

    def __init__(self, examples, labels, pad_token_id):
        """`examples`: an iterable of (input_ids, token_type_ids), two lists of the same length."""
        ids, types, lengths = [], [], []
        for input_ids, token_type_ids in examples:
            ids.append(np.array(input_ids, dtype=np.int32))
            types.append(np.array(token_type_ids, dtype=np.uint8))
            lengths.append(len(input_ids))
        self.ids, self.types = np.concatenate(ids), np.concatenate(types)  # (all tokens,)
        self.lengths = np.array(lengths)  # (N,)
        self.starts = np.cumsum(self.lengths) - self.lengths  # (N,)
        self.labels = torch.tensor(labels, dtype=torch.long)  # (N,)
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

    def batch(self, indices):
        """({input_ids, attention_mask, token_type_ids} each long (N, L), labels (N,))."""
        indices = np.asarray(indices)
        longest = self.lengths[indices].max()
        columns = np.arange(longest)
        mask = columns < self.lengths[indices, None]  # (N, L)
        positions = np.where(mask, self.starts[indices, None] + columns, 0)  # (N, L), 0 is unused
        batch = {"input_ids": np.where(mask, self.ids[positions], self.pad_token_id),
                 "attention_mask": mask, "token_type_ids": np.where(mask, self.types[positions], 0)}
        batch = {name: torch.from_numpy(array.astype(np.int64)) for name, array in batch.items()}
        return batch, self.labels[indices]

    def subset(self, indices):
        """The samples at `indices`, as a Split of their own."""
        picked = [self[i] for i in indices]
        return Split([(x["input_ids"], x["token_type_ids"]) for x in picked],
                     [x["label"] for x in picked], self.pad_token_id)


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


def load_task(name_or_directory, tokenizer, max_length=128, *, max_train=None, seed=0):
    """The embedded `tiny` or `tiny-plain`, or a folder of files (`data.readers`), as a Task.

    A folder without val gives the last tenth of its training rows to validation, unshuffled.
    max_train keeps that many training samples, drawn with `seed`, in their original order.
    Raises ValueError or FileNotFoundError that names the file, the line and what was expected.
    """
    from data import tiny  # here, so that `python -m data.tiny` does not import it twice

    if name_or_directory in tiny.TRAIN_SIZES:
        texts = {name: [(text, None, label) for text, label in samples]
                 for name, samples in tiny.load(name_or_directory).items()}
        labels = list(tiny.LABELS)
    else:
        texts, labels = readers.read_folder(Path(name_or_directory))
    if max_train is not None and max_train < len(texts["train"]):
        generator = torch.Generator().manual_seed(seed)
        kept = torch.randperm(len(texts["train"]), generator=generator)[:max_train].sort().values
        texts["train"] = [texts["train"][i] for i in kept]
    missing = set(range(len(labels))) - {label for _, _, label in texts["train"]}
    if missing:
        names = ", ".join(labels[i] for i in sorted(missing))
        raise ValueError(f"{name_or_directory}: the {len(texts['train'])} training samples have no "
                         f"{names}; every class needs samples there")
    return Task({name: encode(tokenizer, rows, max_length) for name, rows in texts.items()}, labels)


def encode(tokenizer, rows, max_length):
    """Tokenize (text_a, text_b or None, label) rows; pairs are cut longest first."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    pad_token_id = next((i for i in map(tokenizer.token_to_id, ("[PAD]", "<pad>")) if i is not None),
                        0)

    def examples():
        for start in range(0, len(rows), 1000):
            chunk = [a if b is None else (a, b) for a, b, _ in rows[start:start + 1000]]
            for encoding in tokenizer.encode_batch(chunk):
                yield encoding.ids, encoding.type_ids

    return Split(examples(), [label for _, _, label in rows], pad_token_id)
