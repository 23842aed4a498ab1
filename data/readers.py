"""Files of labelled text, read into rows (text_a, text_b or None, label index).

Your own folder holds `train`, and may hold `val`, `test` and any number of `ood_NAME`, each as
.tsv, .csv (both with a header line and the usual CSV quoting) or .jsonl (one object a line).
Columns: `text`, or `text_a` and `text_b`; and `label`, integers or strings.

A SuperGLUE folder (CB, RTE) holds train.jsonl and val.jsonl with `premise`, `hypothesis`, `label`;
its val.jsonl is the test set, as in the paper, because the original test.jsonl has no labels.
"""

import csv
import json

FORMATS = (".tsv", ".csv", ".jsonl")


def read_folder(folder):
    """({split: [(text_a, text_b, label index)]}, [label names]); see the module for the layout."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; --data takes tiny, tiny-plain or a folder "
                                "with train.tsv, train.csv or train.jsonl")
    paths = find_files(folder)
    if is_superglue(paths["train"]) and "val" in paths and not has_labels(paths.get("test")):
        paths["test"] = paths.pop("val")
    rows = {split: list(read_rows(path)) for split, path in paths.items()}
    for split, found in rows.items():
        if not found:
            raise ValueError(f"{paths[split]}: no rows")
    names = sort_labels({label for *_, label in rows["train"]})
    if len(names) < 2:
        raise ValueError(f"{paths['train']}: the only label is {names[0]!r}; expected two or more")
    if "val" not in rows:
        kept = len(rows["train"]) - len(rows["train"]) // 10  # the last tenth, unshuffled
        if kept == len(rows["train"]):
            raise ValueError(f"{paths['train']}: {kept} rows are too few to set a tenth aside for "
                             "validation; expected 10 or more, or a val file")
        rows["train"], rows["val"] = rows["train"][:kept], rows["train"][kept:]
    index = {name: i for i, name in enumerate(names)}
    splits = {}
    for split in ("train", "val", "test", *rows):
        if split in rows and split not in splits:
            splits[split] = [(a, b, label_index(index, label, where))
                             for where, a, b, label in rows[split]]
    return splits, names


def find_files(folder):
    """{split: path} of the files with a name that means something; OOD splits lose their `ood_`."""
    paths = {}
    for path in sorted(folder.iterdir()):
        ood = path.stem.startswith("ood_")
        if path.suffix not in FORMATS or not (ood or path.stem in ("train", "val", "test")):
            continue
        split = path.stem.removeprefix("ood_")
        if split in paths or (ood and split in ("", "train", "val", "test")):
            raise ValueError(f"{path}: a second file for the split {split!r}, or a name that ood_NAME may "
                             "not take (train, val, test)")
        paths[split] = path
    if "train" not in paths:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"{folder}: no train.tsv, train.csv or train.jsonl; found {found}")
    return paths


def is_superglue(path):
    return path.suffix == ".jsonl" and {"premise", "hypothesis"} <= set(first_row(path))


def has_labels(path):
    return path is not None and (path.suffix != ".jsonl" or "label" in first_row(path))


def first_row(path):
    return next(read_jsonl(path), (None, {}))[1]


def read_rows(path):
    """Yield (where, text_a, text_b or None, label as a string) for every row of a file."""
    for where, row in read_jsonl(path) if path.suffix == ".jsonl" else read_table(path):
        for columns in (("text",), ("text_a", "text_b"), ("premise", "hypothesis")):
            if all(name in row for name in columns):
                break
        else:
            raise ValueError(f"{where}: columns {', '.join(row) or 'none'}; expected text, or text_a "
                             "and text_b, and label")
        if "label" not in row:
            raise ValueError(f"{where}: columns {', '.join(row)}; there is no label")
        texts = [row[name] for name in columns]
        for name, text in zip(columns, texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where}: {name} is {text!r}; expected a text that is not empty")
        if not isinstance(row["label"], (str, int)) or str(row["label"]).strip() == "":
            raise ValueError(f"{where}: label is {row['label']!r}; expected an integer or a string")
        yield where, texts[0], (texts[1:] or [None])[0], str(row["label"]).strip()


def read_lines(path):
    """Decoded lines of a UTF-8 file, with or without a byte-order mark."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 text ({error.reason})") from None


def read_jsonl(path):
    """Yield (where, object) for every line that is not blank."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
        yield where, {name.strip().lower(): value for name, value in row.items()}


def read_table(path):
    """Yield (where, {column: cell}) for every row of a .tsv or .csv file with a header line."""
    reader = csv.reader(read_lines(path), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    header = None
    try:
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(cells):
                continue
            if header is None:
                header = [name.strip().lower() for name in cells]
                continue
            if len(cells) != len(header):
                raise ValueError(f"{where}: {len(cells)} columns; the header has {len(header)}")
            yield where, dict(zip(header, cells))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error} (a cell may be quoted, \"...\", with "
                         "quotes inside doubled)") from None


def sort_labels(labels):
    """Class names in the order of their indices: by number where all are integers, else by text."""
    try:
        return sorted(labels, key=lambda label: (int(label), label))
    except ValueError:
        return sorted(labels)


def label_index(index, label, where):
    if label not in index:
        raise ValueError(f"{where}: label {label!r} is not among the training labels "
                         f"{', '.join(index)}")
    return index[label]
