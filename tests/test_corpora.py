"""The paper's data sets: from their original files to the exact text that the encoder reads."""

import collections
import csv
import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import conftest
import train
from conftest import real_data, sample
from data import load_task, read_task, readers, tiny
from data.corpora import CORPORA, corpus_sources
from plumbing.checkpoint import load_pretrained

FOLDERS = {name: next(iter(corpus.files.values())).split("/")[0] for name, corpus in CORPORA.items()}

# One line of each format, as published, with sentences of ours; then what the encoder reads, and the class.
EXAMPLES = {
    "cb": ('{"premise": "It may rain.", "hypothesis": "It rains.", "label": "neutral", "idx": 0}',
           "It may rain.", "It rains.", "neutral"),
    "rte": ('{"premise": "Ann met Bo.", "hypothesis": "Bo met Ann.", "label": "entailment", "idx": 0}',
            "Ann met Bo.", "Bo met Ann.", "entailment"),
    "boolq": ('{"question": "is ice water", "passage": "Ice -- Ice is solid water.", "label": true, "idx": 0}',
              "is ice water", "Ice -- Ice is solid water.", "yes"),
    "wic": ('{"word": "bank", "sentence1": "The bank lent.", "sentence2": "The bank is wet.", "idx": 0, '
            '"label": false, "start1": 4, "start2": 4, "end1": 8, "end2": 8, "version": 1.1}',
            "The bank lent. The bank is wet. Does bank have the same meaning in both sentences?", None,
            "different"),
    "wsc": ('{"text": "Ann fed the cat as it cried.", "target": {"span1_index": 2, "span2_index": 5, '
            '"span1_text": "the cat", "span2_text": "it"}, "label": true, "idx": 0}',
            "it: Ann fed the cat as it cried.", "the cat", "the same"),
    "cola": ('xy01\t0\t*\tThe "cat sleep.', 'The "cat sleep.', None, "unacceptable"),
    "mrpc": ('1\t10\t11\tIt fell " fast " .\tIt " fell quickly .',
             'It fell " fast " .', 'It " fell quickly .', "paraphrase"),
    "sst2": ("a film with one quote ' and \" \t1", "a film with one quote ' and \" ", None, "positive"),
    "amazon": ('"Good, and ""cheap""."\t2', 'Good, and "cheap".', None, "neutral"),
    "pubmed20k": ("METHODS\tWe gave @ mg of Aspirin .", "we gave @ mg of aspirin .", None, "METHODS"),
}
HEADERS = {"mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n", "sst2": "sentence\tlabel\n",
           "amazon": "Text\tLabel\n", "pubmed20k": "###24491034\n"}


def write_corpus(folder, name, lines, end="\n"):
    """The lines, a header where there is one, as every file of a data set."""
    for file in CORPORA[name].files.values():
        path = folder / CORPORA[name].group / file
        path.parent.mkdir(parents=True, exist_ok=True)
        text = HEADERS.get(name, "") + "\n".join(lines) + "\n"
        path.write_bytes(text.replace("\n", end).encode("utf-8"))


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
def test_the_text_that_the_encoder_reads(tmp_path, name, end):
    line, *expected = EXAMPLES[name]
    write_corpus(tmp_path, name, [line], end)
    rows = list(corpus_sources(name, tmp_path)["train"]())
    (where, text_a, text_b, label), = rows
    assert [text_a, text_b, CORPORA[name].labels[label]] == expected
    assert where.endswith(f"line {1 + (name in HEADERS)}")


def direct_read(path):
    """Labels of a file by the shortest code that reads it."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".jsonl":
            return [str(json.loads(line)["label"]) for line in file]
        if path.parent.name == "CoLA":
            return [line.split("\t")[1] for line in file]
        if path.parent.parent.name == "boss":
            return [row["Label"] for row in csv.DictReader(file, delimiter="\t")]
        column = 0 if path.suffix == ".txt" else 1
        return [line.rstrip("\n").split("\t")[column] for line in file][1:]


ROWS = {"cb": (250, 56), "rte": (2490, 277), "wic": (5428, 638), "boolq": (2000, 3270), "wsc": (64, 104),
        "cola": (8551, 1043), "mrpc": (4076, 1725), "sst2": (67349, 872),
        "amazon": (5000, 7600, 4320, 2000, 2210)}


@pytest.mark.parametrize("name", ROWS)
def test_counts_by_split_and_class_of_the_real_files(name):
    """Validation is the last tenth of the training file; every other file is one split."""
    place = real_data(name)
    rows, corpus = read_task(name, place), CORPORA[name]
    sizes = {split: len(samples) for split, samples in rows.splits.items()}
    assert sizes["train"] + sizes["val"] == ROWS[name][0] and sizes["val"] == ROWS[name][0] // 10
    assert [size for split, size in sizes.items() if split not in ("train", "val")] == list(ROWS[name][1:])
    assert rows.metric == ("matthews" if name == "cola" else "accuracy")
    for split, file in corpus.files.items():
        labels = [corpus.labels[label] for label in direct_read(place / corpus.group / file)]
        samples = rows.splits[split] + (rows.splits["val"] if split == "train" else [])
        assert [rows.labels[index] for *_, index in samples] == labels
        if name != "amazon" and (name, split) not in {("boolq", "train"), ("wsc", "train")}:  # these are cut
            assert len(labels) == corpus.rows[split]  # what a download has to have
        print(name, split, dict(collections.Counter(labels)))
    text_a, text_b, index = rows.splits["train"][0]
    print(f"{name} feeds {text_a!r}" + f" with {text_b!r}" * (text_b is not None), "as", rows.labels[index])


def test_real_data_are_looked_for_in_the_readmes_place_first(tmp_path, monkeypatch):
    """datasets/ of the checkout, then ../shared/datasets; a data set is read in the first that has it."""
    assert conftest.PLACES == tuple(conftest.ROOT / place for place in ("datasets", "../shared/datasets"))
    own, shared = tmp_path / "own", tmp_path / "shared"
    monkeypatch.setattr(conftest, "PLACES", (own, shared))
    write_corpus(shared, "cb", [EXAMPLES["cb"][0]])
    write_corpus(shared, "rte", [EXAMPLES["rte"][0]])
    assert real_data("cb") == shared and conftest.find_data("wic") is None
    write_corpus(own, "cb", [EXAMPLES["cb"][0]])
    assert real_data("cb") == own and real_data("rte") == real_data("cb", "rte") == shared
    with pytest.raises(pytest.skip.Exception, match="no real data.* with wic"):
        real_data("wic")


def test_the_folder_may_be_the_publishers_own(superglue, minilm):
    """--data-dir is the folder of all corpora or of one publisher's; token ids are those of the text."""
    _, tokenizer = load_pretrained(minilm)
    above, inside = (load_task("cb", tokenizer, data_dir=folder) for folder in (superglue.parent, superglue))
    assert sample(above.splits["test"], 3) == sample(inside.splits["test"], 3)
    assert {name: len(split) for name, split in above.splits.items()} == {"train": 225, "val": 25, "test": 56}


PANDAS_TEXTS = [  # None: pandas' read_csv finds no text there
    ("Good.", "Good."), ("Two\nlines,\r\nthen a third.", ...), ('It said "cheap".', ...), ('"', ...),
    ("", None), ("\n", None), ("NA", None), ("null", None), ("None", None), ("nan", None), ("N/A", None),
    ("n/a", None), ("<NA>", None), ("na", ...), ("NONE", ...), ("Null", ...), ("NA.", ...), ("  NA", ...),
    ("  Spaces stay.  ", ...), ("Bad.", ...)]


@pytest.mark.parametrize("index", [False, True])
def test_boss_as_pandas_writes_and_reads_it(tmp_path, index, random_folder, capsys):
    """to_csv(sep="\\t"): line breaks inside quotes, maybe row numbers; rows without text are skipped."""
    for file in CORPORA["amazon"].files.values():
        path = tmp_path / "boss" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as out:
            write = csv.writer(out, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_MINIMAL).writerow
            write([""] * index + ["Text", "Label"])
            for number, (text, _) in enumerate(PANDAS_TEXTS * 3):
                write([number] * index + [text, number % 3])
    kept = [(text if expected is ... else expected, str(number % 3))
            for number, (text, expected) in enumerate(PANDAS_TEXTS * 3) if expected is not None]
    task = read_task("amazon", tmp_path)
    rows = [row for row in corpus_sources("amazon", tmp_path)["train"]() if row[1] is not None]
    assert [(text, label) for _, text, _, label in rows] == kept and len(kept) == 33
    assert [row[0].split(", line ")[1] for row in rows[:3]] == ["2", "3", "6"]  # where a row begins
    assert {split: len(samples) for split, samples in task.splits.items()} == {
        "train": 30, "val": 3, "test": 33, "dynasent": 33, "semeval": 33, "sst5": 33}
    words = Tokenizer(WordLevel({"?": 0, **{text: i for i, (text, _) in enumerate(kept, 1)}}, unk_token="?"))
    split = load_task(task, words).splits["val"]  # a text is a word here
    assert split.ids.tolist() == [words.token_to_id(text) for text, _ in kept[-3:]]
    assert split.labels.tolist() == [int(label) for _, label in kept[-3:]]
    assert train.main(["--data", "amazon", "--data-dir", str(tmp_path), "--model", str(random_folder),
                       "--method", "lp", "--out", str(tmp_path / "run")]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "without text" in line]
    counts = "train 27, test 27, dynasent 27, semeval 27, sst5 27"
    assert said == [f"  skipped           rows without text: {counts}"]


def test_missing_files_say_where_they_were_looked_for_and_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_task("wic", tiny.make_tokenizer(), data_dir=tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and "WiC/train.jsonl, WiC/val.jsonl" in message
    assert "python -m data.download wic" in message


# ------------------------------------------------------------------------------------ malformed files

BYTES = [  # lines that are not UTF-8
    b"\xff\xfe broken\n", b"caf\xe9\n", b"\xc3\n", b"\x80\n", b"\xed\xa0\x80\n",
]
JSON = ['{"text": ', "not json", "[1, 2]", '"text"', "5", "null", "{'a': 1}", "{}", '{"label": }', "\x00",
        "[" * 100_000]


def spoil_field(line, **changes):
    row = json.loads(line)
    for name, value in changes.items():
        row.pop(name) if value is ... else row.update({name: value})
    return json.dumps(row)


def spoiled_lines(name):
    """Lines that the reader of this data set must refuse, each on its own."""
    line = EXAMPLES[name][0] if name in EXAMPLES else '{"text": "a", "label": "x"}'
    if line.startswith("{"):
        fields = {"boolq": ("question", "passage"), "wic": ("word", "sentence1", "sentence2"),
                  "wsc": ("text", "target"), "own.jsonl": ("text",)}.get(name, ("premise", "hypothesis"))
        bad = JSON + [spoil_field(line, **{field: value}) for field in fields
                      for value in (..., "", "  ", 5, None, [], "\ud800")]
        return bad + [spoil_field(line, label=value) for value in (..., "", None, 0.5, [], "other", 7)]
    if name == "pubmed20k":
        return ["METHODS", "METHODS\t", "METHODS\t  ", "\tno label", " \ttext", "OTHER\ttext", "methods\ttext",
                "METHODS text", "text", "METHODS,text", "5\ttext", "METHODS\t\t", "RESULTS", "*", "#1", "{}",
                "\nMETHODS\toutside of any abstract", "\n\nRESULTS\toutside", "[]", "-", "METHOD\ttext"]
    cells = line.split("\t")
    bad = ["", "x", "\t", "\t" * (len(cells) + 1), line + "\t", line + "\tmore", "\t".join(cells[:-1]),
           " ".join(cells), ",".join(cells), "0", "{}"]
    for column in range(len(cells)):
        if (name, column) not in (("cola", 0), ("cola", 2), ("mrpc", 1), ("mrpc", 2)):  # not read
            bad += ["\t".join(cells[:column] + [value] + cells[column + 1:]) for value in ("", " ")]
    label = {"cola": 1, "mrpc": 0}.get(name, 1)
    bad += ["\t".join(cells[:label] + [value] + cells[label + 1:]) for value in
            ("3", "-1", "0.0", "yes", "True", "one", "1 0")]
    if name in ("amazon", "own.tsv"):
        bad = [text for text in bad if text]  # a blank line is skipped
        if name == "amazon":  # and a row without text
            bad = [text for text in bad if text.split("\t")[0].strip() or text.count("\t") != 1]
        bad += ['"open\t1', '"a" b\t1', '"\t1', '"a"\t"1']
    return bad


READERS = ["cb", "boolq", "wic", "wsc", "cola", "mrpc", "sst2", "amazon", "pubmed20k"]


@pytest.mark.parametrize("name", READERS)
def test_every_malformed_line_ends_in_one_line_and_status_2(name, random_folder, tmp_path, capsys):
    """At least twenty for each reader; the message names the file and the line."""
    good = EXAMPLES[name][0]
    cases = [text.encode("utf-8", "surrogatepass") + b"\n" for text in spoiled_lines(name)] + BYTES
    assert len(cases) >= 20
    for i, spoiled in enumerate(cases):
        folder = tmp_path / str(i)
        write_corpus(folder, name, [good] * 12)
        path = folder / CORPORA[name].group / CORPORA[name].files["train"]
        line = 13 + (name in HEADERS) + (spoiled.count(b"\n") - 1 if name == "pubmed20k" else 0)
        path.write_bytes(path.read_bytes() + spoiled + (good.encode() + b"\n") * (b'"' not in spoiled))
        check_refusal(["--data", name, "--data-dir", str(folder)], path, random_folder, tmp_path, capsys, spoiled,
                      line)


OWN = {"own.csv": "text,label\n" + "good,x\nbad,y\n" * 10, "own.tsv": "text\tlabel\n" + "good\tx\nbad\ty\n" * 10,
       "own.jsonl": '{"text": "good", "label": "x"}\n{"text": "bad", "label": "y"}\n' * 10}
BAD_CSV = ["a", "a,", ",x", " ,x", "a, ", "a,x,y", ",", ",,", '"a,x', '"a"b,x', '"', '"a","x', "a;x", "a\tx",
           '"a"" ,x', '" ",x', "{}", "0", '"a\nb,x', "a,x,"]


@pytest.mark.parametrize("name", OWN)
def test_every_malformed_line_of_your_own_files_ends_in_one_line_and_status_2(name, random_folder, tmp_path,
                                                                            capsys):
    bad = {"own.csv": BAD_CSV, "own.tsv": [text.replace(",", "\t").replace("a\tx\t", "a\tx\t\t")
                                           for text in BAD_CSV if text != "a\tx"] + ["a,x"],
           "own.jsonl": [text for text in spoiled_lines("own.jsonl")
                         if json_label(text) not in ("other", 7)]}[name]  # labels of your own are free
    cases = [text.encode("utf-8", "surrogatepass") + b"\n" for text in bad] + BYTES
    assert len(cases) >= 20
    for i, spoiled in enumerate(cases):
        path = tmp_path / str(i) / name.replace("own", "train")
        path.parent.mkdir()
        path.write_bytes(OWN[name].encode() + spoiled)
        line = OWN[name].count("\n") + 1  # where the row begins
        check_refusal(["--data", str(path.parent)], path, random_folder, tmp_path, capsys, spoiled, line)


def json_label(text):
    try:
        return json.loads(text)["label"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


WHOLE_FILES = [  # no row at all, a header that is not one, a single class, labels that do not fit
    ("train.csv", "", 1), ("train.csv", "\n\n", 1), ("train.csv", "text,label\n", 1),
    ("train.csv", "text,text,label\na,b,x\n", 1), ("train.csv", "a,b\n1,2\n", 1),
    ("train.csv", "text,label\na,x\nb,x\n", 3), ("train.csv", "text_a,label\na,x\n", 1),
    ("train.csv", "text,label\na,x\nb,y\n", 3),  # too few for a tenth
    ("train.jsonl", "", 1), ("train.jsonl", " \n", 1),
    ("train.csv", "text,label\n" + "a,x\n" * 30 + "b,y\n" * 30, 61),  # validation would be one class
    ("train.tsv", 'text\tlabel\n"good\tx\nbad"\ty\n', 2),  # the quotes belong to the text
    ("train.tsv", 'text\tlabel\n"a"\tx\n"good\tx"\ty\n', 3),
    ("train.tsv", 'text\tlabel\n"two\nlines"\tx\n"good\tx\nfine\ty\nbad\tx\n', 4),  # never closed
    ("train.csv", 'text,label\n"two\n\nlines",x\n"good,x\nfine,y\n', 5),
    ("train.tsv", 'text\tlabel\n"good\tx\nfine\ty\na "bad" one\tx\n', 2),  # closed in line 4, by accident
    ("train.tsv", 'text\tlabel\n"two\nlines"\tx\tx\n', 2), ("train.tsv", '"te\nxt"\tlabel\na\tx\n', 1),
    ("train.csv", "text,label\ra,x\rb,y\r", 1),
    ("train.jsonl", '{"text": "a", "Text": "b", "label": 0}\n', 1),
    ("train.jsonl", '{"te\\nxt": "a", "label": 0}\n', 1), ("train.jsonl", '{"text": "a", "label": "x\\ty"}\n', 1),
    ("test.csv", "text_a,text_b,label\na,b,x\n", 2), ("test.csv", "text,label\na,z\n", 2), ("test.csv", "text,label\n", 1),
    ("val.csv", "text,label\na,x\n,y\n", 3), ("ood_web.csv", "text,label\na,X\n", 2),
]


@pytest.mark.parametrize("file, content, line", WHOLE_FILES)
def test_a_file_that_is_wrong_as_a_whole(file, content, line, random_folder, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    if not file.startswith("train"):
        (tmp_path / "data" / "train.csv").write_text(OWN["own.csv"])
    (tmp_path / "data" / file).write_text(content)
    check_refusal(["--data", str(tmp_path / "data")], tmp_path / "data" / file, random_folder, tmp_path, capsys,
                  content, line)


@pytest.mark.parametrize("file", ["devel.csv", "TEST.csv", "test.CSV", "ood_.csv", "ood_val.csv", "ood_ .csv",
                                  "train.tsv", "notes.jsonl"])
def test_a_file_that_would_not_be_read_is_refused_by_name(file, random_folder, tmp_path, capsys):
    for name in ("train.csv", file):
        (tmp_path / name).write_text(OWN["own.csv"])
    assert train.main(["--data", str(tmp_path), "--model", str(random_folder), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and f"{tmp_path / file}: " in error


def test_three_thousand_labels_make_no_message_of_three_thousand_names(tmp_path):
    rows = "".join(f"a,{i}\nb,{i}\n" for i in range(3000))
    (tmp_path / "train.csv").write_text("text,label\n" + rows)
    (tmp_path / "test.csv").write_text("text,label\na,x\n")
    with pytest.raises(ValueError, match="expected one of 0, 1, 2, 3, 4, 5, 6, 7 and 2992 more"):
        read_task(tmp_path)


def check_refusal(arguments, path, random_folder, tmp_path, capsys, spoiled, line):
    arguments = [*arguments, "--model", str(random_folder), "--out", str(tmp_path / "run")]
    assert train.main(arguments) == 2, spoiled
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and f"{path}, line {line}:" in error, (spoiled, error)
    assert not (tmp_path / "run").exists()


def test_a_cell_in_quotes_may_go_on_over_several_lines(tmp_path):
    """In a .tsv as in a .csv; a tab inside is refused: more likely it means a quote that nobody closed."""
    for suffix, mark in (("tsv", "\t"), ("csv", ",")):
        path = tmp_path / f"train.{suffix}"
        path.write_bytes(f'text{mark}label\n"one\ntwo ""2""\r\n"{mark}x\n\nnext{mark}"y"\n'.encode())
        assert list(readers.read_rows(path)) == [(f"{path}, line 2", 'one\ntwo "2"\r\n', None, "x"),
                                                 (f"{path}, line 6", "next", None, "y")]
    path.with_suffix(".tsv").write_text('text\tlabel\n"good\tx\nbad"\ty\nfine\tx\n')
    with pytest.raises(ValueError, match="line 2: a cell in quotes holds a tab, or its quote is never closed"):
        list(readers.read_rows(path.with_suffix(".tsv")))


@pytest.mark.parametrize("rows, said", [
    ('"good\tx\nbad\ty\n' + "more\tx\n" * 1000, "a quote of the row that begins here is never closed"),
    ('"good\tx\nbad\ty\na "fine" one\tx\n', """'\t' expected after '"' in line 5 (a cell may be quoted"""),
    ('"good" one\tx\n', """'\t' expected after '"' (a cell may be quoted""")])
def test_a_stray_quote_is_named_by_the_line_of_its_row(tmp_path, rows, said):
    """Not by the end of the file, or the line of another quote, to which it may go on."""
    (tmp_path / "train.tsv").write_text("text\tlabel\nfine\tx\n" + rows)
    with pytest.raises(ValueError) as refused:
        read_task(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path / 'train.tsv'}, line 3: {said}")


def test_headers_in_any_case_and_order(tmp_path):
    (tmp_path / "train.tsv").write_bytes(("\ufeffLABEL\tid\tText\r\n" + "x\t1\tgood\r\ny\t2\tbad\r\n" * 10).encode())
    assert read_task(tmp_path).splits["train"][:2] == [("good", None, 0), ("bad", None, 1)]
