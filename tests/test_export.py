"""What a run leaves behind, opened by predict.py, transformers and peft."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers

import predict
import train
from conftest import LORA, SENTENCES, sample
from data import count_unknown, encode, tiny
from plumbing.export import load_classifier, lora_settings
from model import LoRALinear, add_lora, count_parameters
from plumbing import run_folder
from plumbing.checkpoint import load_pretrained

TEXTS = [text for text, _ in tiny.load("tiny")["test"][:40]]


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request, random_folder, tmp_path_factory):
    """(run folder, exported folder) of a short run: of the first token, and with LoRA and the mean."""
    folder = tmp_path_factory.mktemp("run") / request.param
    assert train.main(["--method", "lpft", "--model", str(random_folder), "--data", "tiny-120", "--epochs", "2",
                       "--lr", "2e-3", "--max-length", "64", "--out", str(folder), "--export", f"{folder}-export"]
                      + [*LORA, "--pooling", "mean"] * (request.param == "lora")) == 0
    return folder, folder.with_name(f"{folder.name}-export")


def probabilities_by_transformers(folder, texts):
    """softmax((V h + b) / T) from the exported files, by other people's code alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.AutoModel.from_pretrained(folder).eval()
    head = safetensors.torch.load_file(folder / "head.safetensors")
    with torch.no_grad():
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        hidden, mask = encoder(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
    mean = (folder / "1_Pooling" / "config.json").is_file()
    features = (hidden * mask).sum(1) / mask.sum(1) if mean else hidden[:, 0]
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


def randomize_lora(encoder):
    for module in encoder.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B.weight, std=0.1)


def test_lora_with_copied_weights_equals_peft(minilm):
    """peft's adapter on query and value: same outputs, same number of trained parameters.

    In float64: on padding float32 rounds too coarsely to compare two codes.
    """
    torch.manual_seed(0)
    encoder, tokenizer = load_pretrained(minilm)
    theirs = get_peft_model(
        transformers.AutoModel.from_pretrained(minilm),
        LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], lora_dropout=0.0)).eval()
    add_lora(encoder, r=8, lora_alpha=16)
    randomize_lora(encoder)
    for i, layer in enumerate(encoder.layers):
        for projection in ("query", "value"):
            ours = getattr(layer.attention, projection)
            their = getattr(theirs.base_model.model.encoder.layer[i].attention.self, projection)
            their.lora_A["default"].weight.data.copy_(ours.lora_A.weight)
            their.lora_B["default"].weight.data.copy_(ours.lora_B.weight)
    batch, _ = encode(tokenizer, [(s, None, 0) for s in SENTENCES], 64).batch(range(5))
    with torch.no_grad():
        difference = encoder.double().eval()(**batch) - theirs.double()(**batch).last_hidden_state
    assert difference.abs().max() < 1e-9
    assert count_parameters(encoder)[0] == theirs.get_nb_trainable_parameters()[0]


def test_r_and_alpha_are_saved_loaded_and_exported_each_as_itself(run):
    """classifier.json, the loaded model, peft's adapter_config.json: r = 4 and alpha = 12, and no dropout."""
    folder, exported = run
    lora = "lora" in folder.name
    assert json.loads((folder / "classifier.json").read_text())["lora"] == ([4, 12] if lora else None)
    assert lora_settings(load_classifier(folder)[0].encoder) == ((4, 12) if lora else None)
    assert (exported / "adapter").exists() == lora
    if lora:
        config = json.loads((exported / "adapter" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 12, 0)
        assert config["target_modules"] == ["query", "value"] and config["bias"] == "none"


def test_the_exported_head_and_temperature_are_those_of_the_run(run):
    folder, exported = run
    model, _, settings = load_classifier(folder)
    head = safetensors.torch.load_file(exported / "head.safetensors")
    assert torch.equal(head["weight"], model.head.weight) and torch.equal(head["bias"], model.head.bias)
    assert float(head["temperature"]) == pytest.approx(settings["temperature"], rel=1e-6)
    assert settings["temperature"] == json.loads((folder / "result.json").read_text())["temperature"]


# ------------------------------------------------------------------------------------ predict.py


def edit_settings(folder, **changes):
    content = json.loads((folder / "classifier.json").read_text())
    (folder / "classifier.json").write_text(json.dumps(content | changes))


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
        # six digits are printed, and other padding adds float32 in another order
        assert whole["probabilities"] == pytest.approx(parts["probabilities"], abs=3e-6)
    monkeypatch.setattr(sys, "stdin", Stdin(lines[17].encode()))
    assert predict.main([str(folder), "--format", "jsonl"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["probabilities"] == pytest.approx(outputs[0][17]["probabilities"], abs=3e-6)


@pytest.mark.parametrize("lines, said", [
    ("Worst purchase of my life\nthe screen was good .\n", "30 % of the tokens"),  # 3 of 10
    ("quantum\n" + "good\n" * 38 + "quantum\n", "5 % of the tokens"),  # over all chunks, once
    ("bad\nquantum\n\n", "50 % of the tokens"),  # before the error that ends it
    ("the screen was good .\nmy zenfy is laggy .\n", None)])
def test_words_that_the_tokenizer_does_not_know_are_reported_once(run, lines, said, monkeypatch, capsys):
    """The encoder reads each of them as [UNK], one and the same, so what it says of them is a guess."""
    monkeypatch.setattr(predict, "CHUNK", 8)
    monkeypatch.setattr(sys, "stdin", Stdin(lines.encode()))
    capsys.readouterr()
    assert predict.main([str(run[0])]) == (2 if "\n\n" in lines else 0)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    expected = f"predict.py: warning: {said} are [UNK], words that the tokenizer of this run does not know"
    assert warnings == [expected] * (said is not None)


def test_a_run_from_before_reasons_were_saved_is_read(run, tmp_path, monkeypatch, capsys):
    for path in run[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "classifier.json").read_text())
    del content["temperature_reason"]
    (tmp_path / "classifier.json").write_text(json.dumps(content))
    monkeypatch.setattr(sys, "stdin", Stdin(b"good\n"))
    assert predict.main([str(tmp_path)]) == 0 and "T is 1" not in capsys.readouterr().err


def test_a_tokenizer_of_bytes_knows_every_word():
    """RoBERTa's; WordPiece, BERT's, has a token for the rest."""
    split = encode(tiny.make_tokenizer(), [("good quantum", "nothing good", 0)], 128)
    assert count_unknown(tiny.make_tokenizer(), split, pairs=True) == (2, 4)
    pieces = Tokenizer(models.WordPiece({"<unknown>": 0, "good": 1}, unk_token="<unknown>"))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert count_unknown(pieces, encode(pieces, [("good 東京", None, 0)], 128), pairs=False) == (1, 2)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    of_bytes = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(alphabet))}, []))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert count_unknown(of_bytes, encode(of_bytes, [("a 東京", None, 0)], 128), pairs=False)[0] == 0


@pytest.fixture
def pair_run(run, tmp_path):
    """A copy of the run that says that it was trained on pairs."""
    for path in run[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "classifier.json").read_text())
    (tmp_path / "classifier.json").write_text(json.dumps(content | {"pairs": True}))
    return tmp_path


def test_a_pair_is_read_as_in_training(pair_run, monkeypatch, capsys):
    folder = pair_run
    model, tokenizer, settings = load_classifier(folder)
    batch, _ = encode(tokenizer, [(TEXTS[0], TEXTS[1], 0)], 128).batch([0])
    with torch.no_grad():
        expected = (model(**batch) / settings["temperature"]).softmax(1)[0].tolist()
    monkeypatch.setattr(sys, "stdin", Stdin(f"{TEXTS[0]}\t{TEXTS[1]}\r\n".encode()))
    capsys.readouterr()
    assert predict.main([str(folder)]) == 0
    cells = capsys.readouterr().out.splitlines()[1].split("\t")
    assert [float(cell) for cell in cells[1:]] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("content, flags, message", [
    (b"good\tbad\n\nbad\n", [], "standard input, line 2: an empty text"),
    (b"good\n\xff\n", [], "standard input, line 2: not UTF-8"),
    (b"a\tb\nc\n", ["pairs"], "standard input, line 2: 1 texts"),
    (b"a\tb\tc\n", ["pairs"], "standard input, line 1: 3 texts"),
    (b"a\t \n", ["pairs"], "standard input, line 1: an empty text"),
    (b"a\n", ["--batch-size", "0"], "--batch-size is 0"),
])
def test_a_bad_line_ends_in_one_line_and_what_came_before_is_written(run, pair_run, content, flags, message,
                                                                     monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", Stdin(content))
    try:
        status = predict.main([str(pair_run)] if flags == ["pairs"] else [str(run[0]), *flags])
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
    (lambda folder: edit_settings(folder, temperature=0.0), "classifier.json"),
    (lambda folder: edit_settings(folder, temperature=math.nan), "classifier.json"),
    (lambda folder: edit_settings(folder, max_length=10**6), "classifier.json"),
    (lambda folder: edit_settings(folder, max_length=-1), "classifier.json"),
    (lambda folder: edit_settings(folder, lora=[0, 8]), "classifier.json"),
    (lambda folder: edit_settings(folder, labels=["a", "b"]), "does not fit"),
    (lambda folder: edit_settings(folder, encoder={"model_type": "bert", "hidden_size": -64}), "hidden_size is -64"),
])
def test_a_run_folder_that_is_damaged_is_refused(run, tmp_path, spoil, message, capsys):
    for path in run[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path)
    capsys.readouterr()
    assert predict.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_the_exported_tokenizer_gives_the_same_ids(run):
    """Also where letters are not lower-case, for pairs, and cut at the length of the run."""
    folder, exported = run
    _, tokenizer, _ = load_classifier(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    for a, b in (("the screen was GOOD .", None), ("Café the screen", "was Bad ."), ("good " * 300, "bad " * 300)):
        ours = sample(encode(tokenizer, [(a, b, 0)], 64), 0)
        expected = theirs(a, b, truncation="longest_first")
        assert ours["input_ids"] == expected["input_ids"]
        assert ours["token_type_ids"] == expected["token_type_ids"]


def test_a_file_that_cannot_be_read_is_named(run, tmp_path, capsys):
    """A table, too: its header would be a text, its labels part of one."""
    table = tmp_path / "train.csv"
    table.write_text("text,label\ngood,yes\n")
    for path, what in ((tmp_path / "none.txt", "no such file"), (tmp_path, "is not lines of text"), (table, "is not lines of text")):
        assert predict.main([str(run[0]), str(path)]) == 2
        expected = f"predict.py: error: {path}: {what}; expected one sample a line, without header or label\n"
        assert capsys.readouterr().err == expected
    with pytest.raises(SystemExit):
        predict.main([str(run[0]), "--form", "jsonl"])  # flags are not abbreviated
    assert "unrecognized arguments: --form" in capsys.readouterr().err


def test_predictions_into_a_closed_pipe_end_quietly(run, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS * 500) + "\n")
    command = f"{sys.executable} predict.py {run[0]} {tmp_path / 'texts.txt'} | head -2"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True,
                          cwd=Path(predict.__file__).parent)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    assert "Traceback" not in done.stderr and "error" not in done.stderr


def test_sigterm_stops_predict_py_as_ctrl_c_does(run):
    """It waits for lines that never come; the progress bar says that it has begun to wait."""
    process = subprocess.Popen([sys.executable, "predict.py", str(run[0])], stdin=subprocess.PIPE, stderr=subprocess.PIPE,
                               cwd=Path(predict.__file__).parent)
    said = b""
    while b"predicting" not in said:
        said += (more := process.stderr.read(1))
        assert more, said
    process.terminate()
    assert process.communicate(timeout=60)[1].decode().splitlines()[-1] == "predict.py: interrupted"
    assert process.returncode == 130


def test_a_refused_command_leaves_every_file_that_was_there(random_folder, tmp_path, capsys):
    """Not even a config.json that looks like its own; and of two runs, one gets an empty folder."""
    (tmp_path / "config.json").write_text("precious")
    for arguments in (["--out", str(tmp_path)], ["--out", str(tmp_path / "x"), "--export", str(tmp_path / "x")],
                      ["--out", str(tmp_path / "config.json")]):
        assert train.main(["--model", str(random_folder), *arguments]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    args = train.parse_args(["--out", str(tmp_path / "run")])
    lock, made = run_folder.claim_folders(args)
    assert train.main(["--model", str(random_folder), "--out", str(tmp_path / "run")]) == 2
    assert (tmp_path / "run" / "lock").exists() and made == [tmp_path / "run"]
    run_folder.release_folders(args, lock, made)
    assert not (tmp_path / "run").exists()


def test_export_does_not_write_over_anything(random_folder, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("precious")
    assert train.main(["--model", str(random_folder), "--out", str(tmp_path / "run"), "--export",
                       str(tmp_path / "taken")]) == 2
    assert "--export" in capsys.readouterr().err and not (tmp_path / "run").exists()
