"""What train.py is given wrong, one line a case: status 2, one sentence that names it, nothing written."""

import json
import os
import re
import shutil

import pytest
import torch

import train
from plumbing.checkpoint import read_safetensors, write_safetensors

# (flags, what the line says); the model is a random tiny encoder, the data the embedded task
FLAGS = [
    ("--method sft", "argument --method: invalid choice: 'sft'"),
    ("--method lp --lora", "--lora has no effect: --method lp has no FT stage"),
    ("--lora-r 4", "--lora-r has no effect: it needs --lora"),
    ("--lora --lora-r 0", "--lora-r is 0; expected a number above 0"),
    ("--lora --lora-r 65", "--lora-r 65: more than the width 64"),
    ("--lora --lora-r 2.5", "argument --lora-r: invalid int value: '2.5'"),
    ("--lora --lora-alpha -1", "--lora-alpha is -1.0"),
    ("--lora --lora-alpha nan", "--lora-alpha is nan"),
    ("--lp-scoring f1", "argument --lp-scoring: invalid choice"),
    ("--method ft --lp-scoring accuracy", "--lp-scoring has no effect"),
    ("--lp-inverse-l2 0", "--lp-inverse-l2 is 0.0"),
    ("--lp-inverse-l2 1 --lp-scoring accuracy", "--lp-inverse-l2 fixes the penalty"),
    ("--metho lp", "unrecognized arguments: --metho lp; --help lists the flags"),
    ("--epochs 0", "--epochs is 0"),
    ("--epochs 1.5", "argument --epochs: invalid int value"),
    ("--method lp --epochs 3", "--epochs has no effect: --method lp has no FT stage"),
    ("--method lp --batch-size 3", "--batch-size has no effect"),
    ("--method lp --ntk 10", "--ntk has no effect"),
    ("--method lp --head-scale 2", "--head-scale has no effect"),
    ("--batch-size 0", "--batch-size is 0"),
    ("--batch-size -8", "--batch-size is -8"),
    ("--lr 0", "--lr is 0.0"),
    ("--lr nan", "--lr is nan"),
    ("--lr inf", "--lr is inf"),
    ("--lr fast", "argument --lr: invalid float value: 'fast'"),
    ("--lr 1e14 --epochs 1", "in epoch 1, at --lr 1e+14"),
    ("--head-scale 0", "--head-scale is 0.0"),
    ("--ntk 0", "--ntk is 0; expected 1 to 250"),
    ("--ntk 251", "--ntk is 251"),
    ("--ntk 5", "kernel regression needs 5 of each"),
    ("--seed -1", "--seed is -1"),
    ("--seed 4294967296", "--seed is 4294967296"),
    ("--device tpu", "argument --device: invalid choice: 'tpu'"),
    pytest.param("--device cuda", "--device cuda: this PyTorch", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a GPU")),
    ("--max-length 7", "--max-length is 7; expected 8 to 1000000"),
    ("--max-length 129", "has positions for 128 tokens at most"),
    ("--max-train 0", "--max-train is 0"),
    ("--max-test -1", "--max-test is -1"),
    ("--max-train 1", "every class needs samples there"),
    ("--max-train 12", "5-fold cross-validation needs 5 training samples of each class"),
    ("--data-dir here", "--data-dir has no effect: --data is tiny"),
    ("--data nowhere", "nowhere: no such folder"),
    ("--data rte", "datasets"),
    ("--data cb --data-dir nowhere", "nowhere"),
    ("--model ../nowhere/at/all", "no such folder"),
    ("--model file.txt", "file.txt"),
    ("--out file.txt", "--out file.txt: is a file already"),
    ("--out full", "--out full: holds something already"),
    ("--out file.txt/run", "file.txt"),
    ("--export full", "full: holds something already"),
    ("--export run --out run", "is also --out"),
    ("--resume full", "--resume full: holds no config.json"),
    ("--resume nowhere", "--resume nowhere: holds no config.json"),
    ("--resume full --seed 3", "expected no other flag"),
    ("--learning-rate 1", "unrecognized arguments: --learning-rate 1"),
]


def rows(*labels):
    return "".join(f"text {i},{label}\n" for i, label in enumerate(labels))


GOOD = "text,label\n" + rows(*"abab" * 10)
# (files of the folder, what the line says)
FILES = [
    ({}, "no train.tsv, train.csv or train.jsonl; found none"),
    ({"train.csv": ""}, "train.csv, line 1: the file has no rows"),
    ({"train.csv": "text,label\n"}, "train.csv, line 1: the file has no rows"),
    ({"train.csv": "text,label\n" + rows("a", "a", "a")}, "'a' is its only label"),
    ({"train.csv": "text,label\n" + rows(*"ababab", "c")},
     "train.csv, line 8: the end; there is no val file, and the last tenth of 7 rows, to be validation, has "
     "fewer than two classes; put the rows in random order, or add rows or a val file"),
    ({"train.csv": "text,label\n" + rows(*"a" * 20, *"b" * 20)},
     "train.csv, line 41: the end; there is no val file, and the last tenth of 40 rows, to be validation, has "
     "fewer than two classes"),
    ({"train.csv": "text,label\n" + rows(*"ab" * 10) + "a good film,Ab \n" + rows(*["ab", "b"] * 10)},
     "train.csv, line 22: label 'Ab' occurs once, of the text 'a good film', and 'ab' 10 times; correct it, "
     "or, if it is a class of its own, add rows of it"),
    ({"train.csv": "text,label\n" + rows(*"abab" * 10, *"a" * 20), "val.csv": GOOD.replace(",a", ",c")},
     "val.csv, line 2: label 'c'; expected one of a, b"),
    ({"train.csv": "text,label\n" + rows(*"a" * 20, *"b" * 4), "val.csv": GOOD}, "'b' has 4; take more samples"),
    ({"train.csv": GOOD + ",a\n"},
     "train.csv, line 42: text is ''; expected a text that is not empty"),
    ({"train.csv": GOOD + ",a\nfine,b\n \t,a\nend,b\n"},
     "train.csv, line 42: text is ''; expected a text that is not empty"),
    ({"train.csv": "text_a,text_b,label\n" + "x,y,a\n" * 8 + "x, ,b\n"}, "train.csv, line 10: text_b is ' ';"),
    ({"train.jsonl": '{"text": "x", "label": "a"}\n{"text": null, "label": "b"}\n'},
     "train.jsonl, line 2: text is None; expected a text that is not empty"),
    ({"train.csv": GOOD + "more, \n"}, "train.csv, line 42: label is ' '"),
    ({"train.csv": GOOD + "one,two,a\n"}, "train.csv, line 42: 3 columns; the header has 2 (a text with a comma in"),
    ({"train.csv": "text;label\n" + GOOD}, "is: text;label (cells are separated by commas); expected text"),
    ({"train.csv": "label,text\n" + GOOD.split("\n", 1)[1]}, "line 2: 40 different labels in 40 rows, such as text 0, text 1; "
     "are text and label swapped?"),
    ({"train.csv": GOOD.encode() + b"\xff\x00\xfe,a\n"}, "train.csv, line 42: not a text file"),
    ({"train.csv": GOOD + '"open,a\n'}, "train.csv, line 42"),
    ({"train.csv": "text\n" + "some text\n" * 5}, "train.csv, line 1: must be the header, and is: text;"),
    ({"train.csv": "txt,label\nsome text,0\n"},
     "line 1: must be the header, and is: txt, label; expected text (or sentence), or text_a and text_b, and label"),
    ({"train.csv": "A film.,1\n" + rows(*"0101")}, "csv, line 1: must be the header, and is: A film., 1;"),
    ({"train.csv": "1,1\n" + rows(*"0101")}, "train.csv, line 1: must be the header, and is: 1, 1;"),
    ({"train.jsonl": '{"txt": "x", "label": "a"}\n'}, "jsonl, line 1: columns txt, label; expected text"),
    ({"train.csv": "sentences,label\n" + rows(*"abab")}, "expected text (or sentence), or text_a and text_b, and label"),
    ({"train.csv": "text,text,label\nx,y,a\n"}, "the header has two columns 'text'"),
    ({"train.csv": GOOD.encode() + b"caf\xe9,a\n"},
     "train.csv, line 42: not UTF-8 text (invalid continuation byte); "
     "if it is WINDOWS-1252, iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW converts it"),
    ({"train.csv": GOOD.encode("utf-16")}, "train.csv, line 1: not UTF-8 text (invalid start byte); "
     "if it is UTF-16, iconv -f UTF-16 -t UTF-8 FILE > NEW converts it"),
    ({"train.csv": GOOD, "train.tsv": GOOD}, "a second file for the split train"),
    ({"train.csv": GOOD, "devel.csv": GOOD}, "devel.csv: not a name that is read"),
    ({"train.csv": GOOD, "dev.csv": GOOD, "validation.csv": GOOD}, "on.csv: a second file for the split val"),
    ({"train.csv": GOOD, "ood_val.csv": GOOD}, "ood_val.csv: not a name that is read"),
    ({"train.csv": GOOD, "test.csv": "text_a,text_b,label\nx,y,a\n"}, "test.csv, line 2: two texts"),
    ({"train.csv": GOOD, "test.csv": "text,label\n"}, "test.csv, line 1: the file has no rows"),
    ({"train.jsonl": '{"text": "x", "label": "a"}\n{"text": "x"\n'}, "train.jsonl, line 2: not JSON"),
    ({"train.jsonl": '["x", "a"]\n'}, "train.jsonl, line 1: expected one JSON object a line, found list"),
    ({"train.jsonl": '{"text": 3, "label": "a"}\n'}, "train.jsonl, line 1: text is 3"),
    ({"train.jsonl": '{"text": "x", "label": null}\n'}, "train.jsonl, line 1: label is None"),
    ({"train.jsonl": '{"text": "x", "label": 0.5}\n'}, "train.jsonl, line 1: label is 0.5"),
    ({"train.jsonl": '{"text": "\\ud800", "label": "a"}\n'}, "lone surrogate"),
    ({"train.jsonl": '{"text": "x", "Text": "y", "label": "a"}\n'}, "differ in case alone"),
    ({"train.jsonl": "[" * 100_000}, "train.jsonl, line 1: not JSON"),
]


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, keep):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def config(**changes):
    def change(folder):
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(found | changes))
    return change


def weights(change):
    def changed(folder):
        tensors = read_safetensors(folder / "model.safetensors")
        change(tensors)
        write_safetensors(folder / "model.safetensors", tensors)
    return changed


class Code:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


def gap_in_the_ids(folder):
    """As many tokens as the encoder has rows, but the last just beyond the last row."""
    text = (folder / "tokenizer.json").read_text()
    vocabulary = json.loads(text)["model"]["vocab"]
    word, last = max(vocabulary.items(), key=lambda item: item[1])
    (folder / "tokenizer.json").write_text(re.sub(rf'("{re.escape(word)}": ){last}\b', rf"\g<1>{last + 1}", text))


def bin_with_code(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"embeddings": Code()}, folder / "pytorch_model.bin")


EMBEDDINGS = "embeddings.word_embeddings.weight"
# (what is done to a good checkpoint folder, what the line says)
CHECKPOINTS = [
    (remove("config.json"), "config.json: no such file"),
    (write("config.json", b"{"), "config.json: not a JSON file"),
    (write("config.json", b"[]"), "config.json: expected a JSON object, found list"),
    (write("config.json", b"\xff\xfe"), "config.json: not a JSON file"),
    (config(model_type="gpt2"), "gpt2"),
    (config(hidden_size=63), "hidden_size"),
    (config(num_attention_heads=0), "num_attention_heads"),
    (config(num_hidden_layers="two"), "num_hidden_layers"),
    (config(hidden_act="relu"), "relu"),
    (config(vocab_size=100), "config.json makes it (100, 64)"),
    (config(num_hidden_layers=3), "model.safetensors"),
    (remove("tokenizer.json"), "tokenizer.json: no such file"),
    (write("tokenizer.json", b"{}"), "tokenizer.json: not a tokenizers file"),
    (cut("tokenizer.json", 1000), "tokenizer.json: not a tokenizers file"),
    (gap_in_the_ids, "tokenizer.json: the largest token id is 282, but config.json has vocab_size 282"),
    (remove("model.safetensors"), "model.safetensors: no such file"),
    (cut("model.safetensors", 5), "model.safetensors: not a whole safetensors file"),
    (cut("model.safetensors", 100), "model.safetensors: not a whole safetensors file"),
    (cut("model.safetensors", 100_000), "claims bytes"),
    (write("model.safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00[]"), "broken safetensors header"),
    (weights(lambda tensors: tensors.pop(EMBEDDINGS)), EMBEDDINGS),
    (weights(lambda tensors: tensors.update({EMBEDDINGS: torch.zeros(282, 32)})), EMBEDDINGS),
    (weights(lambda tensors: tensors[EMBEDDINGS].fill_(float("nan"))), "NaN or infinity"),
    (bin_with_code, "model.safetensors: no such file; weights in other formats"),
]


def refused(flags, says, capsys, untouched):
    """Run train.py in the present folder: status 2, one line that says it, and the folder as it was.

    Apart from runs/, where a run that was under way keeps what it had.
    """
    def files():
        return {path: path.is_file() and path.read_bytes() for path in untouched.rglob("*")
                if untouched / "runs" not in (path, *path.parents)}

    before = files()
    try:
        status = train.main(flags)
    except SystemExit as end:
        status = end.code
    *bars, last = capsys.readouterr().err.splitlines()
    assert status == 2 and last.startswith("train.py: error: ") and says in last, last
    assert not [line for line in bars if line.strip() and not re.search(r"(it|step)/s\]|s/(it|step)\]", line)]
    assert files() == before


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    return tmp_path


def test_there_are_enough_cases():
    assert len(FLAGS) + len(FILES) + len(CHECKPOINTS) >= 60


@pytest.mark.parametrize("flags, says", FLAGS)
def test_flags(flags, says, here, random_folder, capsys):
    model = [] if "--model" in flags or "--resume" in flags else ["--model", str(random_folder)]
    refused(model + flags.split(), says, capsys, here)


@pytest.mark.parametrize("files, says", FILES)
def test_files(files, says, here, random_folder, capsys):
    (here / "data").mkdir()
    for name, content in files.items():
        (here / "data" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(["--model", str(random_folder), "--data", "data"], says, capsys, here)


@pytest.mark.parametrize("damage, says", CHECKPOINTS)
def test_checkpoints(damage, says, here, random_folder, capsys):
    shutil.copytree(random_folder, here / "model")
    damage(here / "model")
    refused(["--model", "model"], says, capsys, here)
