"""What a run leaves behind, opened by predict.py, transformers and peft."""

import io
import json
import sys

import pytest
import safetensors.torch
import torch
import transformers
from peft import PeftModel

import predict
import train
from data import encode, tiny
from export import load_classifier
from model import LoRALinear

TEXTS = [text for text, _ in tiny.load("tiny")["test"][:40]]


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request, random_folder, tmp_path_factory):
    """(run folder, exported folder) of a short run, with and without LoRA."""
    folder = tmp_path_factory.mktemp("run") / request.param
    assert train.main(["--method", "lpft", "--model", str(random_folder), "--data", "tiny-plain", "--epochs", "2",
                       "--lr", "2e-3", "--out", str(folder), "--export", f"{folder}-export"]
                      + ["--lora"] * (request.param == "lora")) == 0
    return folder, folder.with_name(f"{folder.name}-export")


def probabilities_by_transformers(folder, texts):
    """softmax((V h + b) / T) from the exported files, by other people's code alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.AutoModel.from_pretrained(folder).eval()
    head = safetensors.torch.load_file(folder / "head.safetensors")
    with torch.no_grad():
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        features = encoder(**batch).last_hidden_state[:, 0]
    return ((features @ head["weight"].T + head["bias"]) / head["temperature"]).softmax(1)


def test_predict_and_the_exported_folder_say_the_same(run, tmp_path, capsys):
    folder, exported = run
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    capsys.readouterr()
    assert predict.main([str(folder), str(tmp_path / "texts.txt")]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    labels = list(tiny.LABELS)
    assert header.split("\t") == ["label", *labels] and len(lines) == len(TEXTS)
    expected = probabilities_by_transformers(exported, TEXTS)
    found = torch.tensor([[float(cell) for cell in line.split("\t")[1:]] for line in lines])
    assert (found - expected).abs().max() < 1e-5
    assert [line.split("\t")[0] for line in lines] == [labels[i] for i in expected.argmax(1)]


def test_hidden_states_of_the_exported_encoder(run):
    """AutoModel reads it, LoRA merged, every token alike to 1e-5."""
    folder, exported = run
    model, tokenizer, _ = load_classifier(folder)
    batch, _ = encode(tokenizer, [(text, None, 0) for text in TEXTS], 128).batch(range(len(TEXTS)))
    theirs, info = transformers.AutoModel.from_pretrained(exported, add_pooling_layer=False,
                                                          output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        difference = model.encoder(**batch) - theirs.eval()(**batch).last_hidden_state
    assert (difference * batch["attention_mask"].unsqueeze(2)).abs().max() < 1e-5
    assert transformers.AutoConfig.from_pretrained(exported).id2label == dict(enumerate(tiny.LABELS))


def test_the_adapter_opens_in_peft_over_the_original_encoder(run, random_folder):
    folder, exported = run
    if not (exported / "adapter").exists():
        assert "lora" not in folder.name
        return
    model, tokenizer, _ = load_classifier(folder)
    trained = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert trained and all(m.lora_B.weight.abs().max() > 1e-3 for m in trained)  # it has moved
    base = transformers.AutoModel.from_pretrained(random_folder, add_pooling_layer=False)
    theirs = PeftModel.from_pretrained(base, exported / "adapter").eval()
    batch, _ = encode(tokenizer, [(text, None, 0) for text in TEXTS], 128).batch(range(len(TEXTS)))
    with torch.no_grad():
        difference = model.encoder(**batch) - theirs(**batch).last_hidden_state
    assert (difference * batch["attention_mask"].unsqueeze(2)).abs().max() < 1e-5


# ------------------------------------------------------------------------------------ predict.py


class Stdin:
    def __init__(self, content):
        self.buffer = io.BytesIO(content)


def test_order_is_kept_across_chunks_and_lengths(run, monkeypatch, capsys):
    """Lines are sorted by length inside a chunk, and written in the order in which they came."""
    folder, _ = run
    lines = [TEXTS[i % 40] + " ." * (i % 7) for i in range(50)]
    outputs = []
    for size in (10_000, 8):
        monkeypatch.setattr(predict, "CHUNK", size)
        monkeypatch.setattr(sys, "stdin", Stdin("\n".join(lines).encode()))  # no line end behind the last
        capsys.readouterr()
        assert predict.main([str(folder), "--format", "jsonl"]) == 0
        outputs.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert len(outputs[0]) == 50
    for whole, parts in zip(*outputs):
        assert whole["label"] == parts["label"] == max(whole["probabilities"], key=whole["probabilities"].get)
        assert whole["probabilities"] == pytest.approx(parts["probabilities"], abs=2e-6)
    monkeypatch.setattr(sys, "stdin", Stdin(lines[17].encode()))
    assert predict.main([str(folder), "--format", "jsonl"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["probabilities"] == pytest.approx(outputs[0][17]["probabilities"], abs=2e-6)


def test_a_pair_is_read_as_in_training(run, monkeypatch, capsys):
    folder, _ = run
    model, tokenizer, settings = load_classifier(folder)
    batch, _ = encode(tokenizer, [(TEXTS[0], TEXTS[1], 0)], 128).batch([0])
    with torch.no_grad():
        expected = (model(**batch) / settings["temperature"]).softmax(1)[0].tolist()
    monkeypatch.setattr(sys, "stdin", Stdin(f"{TEXTS[0]}\t{TEXTS[1]}\r\n".encode()))
    capsys.readouterr()
    assert predict.main([str(folder), "--pairs"]) == 0
    cells = capsys.readouterr().out.splitlines()[1].split("\t")
    assert [float(cell) for cell in cells[1:]] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("content, flags, message", [
    (b"good\n\nbad\n", [], "standard input, line 2: an empty text"),
    (b"good\n\xff\n", [], "standard input, line 2: not UTF-8"),
    (b"a\tb\nc\n", ["--pairs"], "standard input, line 2: 1 texts"),
    (b"a\tb\tc\n", ["--pairs"], "standard input, line 1: 3 texts"),
    (b"a\t \n", ["--pairs"], "standard input, line 1: an empty text"),
    (b"a\n", ["--batch-size", "0"], "--batch-size is 0"),
])
def test_a_bad_line_ends_in_one_line_and_what_came_before_is_written(run, content, flags, message, monkeypatch,
                                                                     capfd):
    monkeypatch.setattr(sys, "stdin", Stdin(content))
    try:
        status = predict.main([str(run[0]), *flags])
    except SystemExit as end:
        status = end.code
    out, error = capfd.readouterr()
    assert status == 2
    last = error.replace("\r", "\n").splitlines()[-1]
    assert message in last and "Traceback" not in error
    good = content.split(b"\n")[:int(message.split("line ")[1][0]) - 1] if "line" in message else []
    assert len(out.splitlines()) == (1 + len(good) if "line" in message else 0)


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: (folder / "classifier.json").unlink(), "no classifier.json"),
    (lambda folder: (folder / "classifier.json").write_text("{}"), "not what train.py writes"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), "model.safetensors"),
    (lambda folder: safetensors.torch.save_file({"head.bias": torch.zeros(3)}, folder / "model.safetensors"),
     "does not fit"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
])
def test_a_run_folder_that_is_damaged_is_refused(run, tmp_path, spoil, message, capsys):
    for path in run[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path)
    capsys.readouterr()
    assert predict.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_export_does_not_write_over_anything(random_folder, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("precious")
    assert train.main(["--model", str(random_folder), "--out", str(tmp_path / "run"), "--export",
                       str(tmp_path / "taken")]) == 2
    assert "--export" in capsys.readouterr().err and not (tmp_path / "run").exists()
