"""Files of labelled text, read as rows (where, text_a, text_b or None, label), one at a time.

Your own folder holds `train`, and may hold `val` (or `dev`, `validation`), `test` and any number of
`ood_NAME`, each as .tsv, .csv (both with a header line and the usual CSV quoting) or .jsonl (one object a
line). Columns, in any case and order: `text` (or `sentence`), or `text_a` and `text_b` (or `premise` and
`hypothesis`); and `label`, integers or strings.

`where` names the file and the line. Every reader raises ValueError that begins with it.
"""

import csv
import json
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from difflib import get_close_matches
from functools import partial

FORMATS = (".tsv", ".csv", ".jsonl")
SPLITS = {"train": "train", "val": "val", "dev": "val", "validation": "val", "test": "test"}  # {file: split}
csv.field_size_limit(2**31 - 1)  # a text may be long


def folder_sources(folder):
    """{split: function that yields the rows of its file}; OOD splits lose their `ood_`."""
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "no such folder"
        raise FileNotFoundError(f"{folder}: {what}; --data takes the name of a task (see --help) or a folder "
                                "with train.tsv, train.csv or train.jsonl")
    paths = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in FORMATS):
        name = path.stem.removeprefix("ood_")
        ood = name != path.stem and name not in SPLITS.values() and re.fullmatch(r"[\w-]+", name)
        if not (path.stem in SPLITS or ood) or path.suffix not in FORMATS:
            raise ValueError(f"{path}: not a name that is read; expected train, val, test or ood_NAME (NAME "
                             "of letters, digits, _ and -) with .tsv, .csv or .jsonl")
        split = SPLITS.get(path.stem, name)
        if split in paths:
            raise ValueError(f"{path}: a second file for the split {split}; the first is {paths[split].name}")
        paths[split] = path
    if "train" not in paths:
        raise FileNotFoundError(f"{folder}: no train.tsv, train.csv or train.jsonl; found "
                                + listing(sorted(path.name for path in folder.iterdir())))
    return {split: partial(read_rows, path) for split, path in paths.items()}


def read_rows(path):
    """Yield (where, text_a, text_b or None, label as a string) for every row of a file."""
    for where, row in read_jsonl(path) if path.suffix == ".jsonl" else read_table(path):
        yield where, *texts_of(where, row, *text_columns(where, row)), label_of(where, row)


def text_columns(where, names, message=None):
    """Those of the `names` that are text; ValueError, with the message, if they are not the module's."""
    for columns in (("text",), ("sentence",), ("text_a", "text_b"), ("premise", "hypothesis")):
        if all(name in names for name in columns) and "label" in names:
            return columns
    message = message or f"columns {listing(names)}"
    raise ValueError(f"{where}: {message}; expected text (or sentence), or text_a and text_b, and label")


def texts_of(where, row, name_a, name_b=None):
    """(text_a, text_b or None) from the columns of these names, or of one alone."""
    texts = []
    for name in filter(None, (name_a, name_b)):
        text = row.get(name)
        if name not in row:
            raise ValueError(f"{where}: columns {listing(row)}; there is no {name}")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: {name} is {repr(text)[:60]}; expected a text that is not empty")
        if re.search("[\ud800-\udfff]", text):  # JSON can hold half of a pair
            raise ValueError(f"{where}: {name} holds a lone surrogate, which is no character")
        texts.append(text)
    return texts if len(texts) == 2 else [*texts, None]


def label_of(where, row):
    """The label as a string; it will stand in tables, so it holds no control characters."""
    if "label" not in row:
        raise ValueError(f"{where}: columns {listing(row)}; there is no label")
    label = row["label"]
    if not isinstance(label, (str, int)) or not str(label).strip() or re.search(
            "[\x00-\x1f\ud800-\udfff]", str(label).strip()):
        raise ValueError(f"{where}: label is {repr(label)[:60]}; expected an integer or a line of text")
    return str(label).strip()


def listing(names):
    """Names for a message of one line."""
    names = [name if name.isprintable() else repr(name) for name in map(str, names)]
    more = f" and {len(names) - 8} more" * (len(names) > 8)
    return ", ".join(name[:40] for name in names[:8]) + more or "none"


def read_lines(path):
    """Decoded lines of a UTF-8 file, with or without a byte-order mark; their ends stay."""
    with open(path, "rb") as file:
        yield from decode_lines(file, path)


def decode_lines(lines, name):
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            encoding = "UTF-16" if line.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "WINDOWS-1252"
            if b"\0" in line and encoding != "UTF-16":
                raise ValueError(f"{name}, line {number}: not a text file") from None
            raise ValueError(f"{name}, line {number}: not UTF-8 text ({error.reason}); if it is {encoding}, "
                             f"iconv -f {encoding} -t UTF-8 FILE > NEW converts it") from None


def read_jsonl(path):
    """Yield (where, object) for every line that is not blank; names of columns in lower case."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({getattr(error, 'msg', error)})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected one JSON object a line, found {type(row).__name__}")
        columns = {name.strip().lower(): value for name, value in row.items()}
        if len(columns) < len(row):
            raise ValueError(f"{where}: two of the names {listing(row)} differ in case alone")
        yield where, columns


def read_table(path):
    """Yield (where, {column: cell}) for every row of a .tsv or .csv file with a header line.

    A cell in quotes may go on over lines; `where` is the line in which its row begins.
    """
    tabs = path.suffix == ".tsv"
    reader = csv.reader(read_lines(path), delimiter="\t" if tabs else ",", strict=True)
    header, line = None, 1
    try:
        for cells in reader:
            where, line = f"{path}, line {line}", reader.line_num + 1
            if not cells:  # a blank line
                continue
            if header is None:
                header = [name.strip().lower() for name in cells]
                hint = " (cells are separated by commas)" * (not tabs and len(cells) == 1 and ";" in cells[0])
                text_columns(where, header, f"must be the header, and is: {listing(cells)}{hint}")
                twice = [name for name in header if header.count(name) > 1]
                if twice:
                    raise ValueError(f"{where}: the header has two columns {twice[0][:60]!r}")
                continue
            if tabs and any("\t" in cell for cell in cells):
                raise ValueError(f"{where}: a cell in quotes holds a tab, or its quote is never closed; put "
                                 "a space for the tab, double a quote that is text, or use .jsonl")
            if len(cells) != len(header):
                raise ValueError(f"{where}: {len(cells)} columns; the header has {len(header)} (a text with "
                                 f"a {'tab' if tabs else 'comma'} in it has to be in quotes)")
            yield where, dict(zip(header, cells))
    except csv.Error as error:
        quoting = "(a cell may be quoted, \"...\", with quotes inside doubled)"
        why = f"{error}" + f" in line {reader.line_num}" * (reader.line_num > line) + f" {quoting}"
        if "new-line character" in why:
            why = "a carriage return alone does not end a line; expected LF or CR LF"
        if "unexpected end" in why:
            why = f"a quote of the row that begins here is never closed {quoting}"
        raise ValueError(f"{path}, line {line}: {why}") from None


def refuse_typos(rows):
    """ValueError for a label of a single row that is spelt nearly as one of five rows or more.

    `rows` (where, text_a, text_b, label). Labels with other numbers in them, as class 1 and class 2, are not
    alike.
    """
    counts = Counter(label for *_, label in rows)
    often = {label.lower(): label for label, count in counts.items() if count >= 5}
    for where, text, _, label in rows:
        for other in get_close_matches(label.lower(), often, cutoff=0.85) if counts[label] == 1 else ():
            if re.findall(r"\d+", label) == re.findall(r"\d+", other):
                raise ValueError(f"{where}: label {label[:60]!r} occurs once, of the text {text[:60]!r}, and "
                                 f"{often[other][:60]!r} {counts[often[other]]} times; correct it, or, if it "
                                 "is a class of its own, add rows of it")


def sort_labels(labels):
    """Class names in the order of their indices: by number where all are integers, else by text."""
    try:
        return sorted(labels, key=lambda label: (int(label), label))
    except ValueError:
        return sorted(labels)
