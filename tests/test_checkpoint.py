"""The safetensors reader: compatible with the format's own package, and closed to broken files."""

import hashlib
import http.server
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from conftest import SENTENCES, find_data, sample
from data import encode, tiny
from data.corpora import corpus_sources
from plumbing import checkpoint
from plumbing.checkpoint import (check_config, load_pretrained, read_safetensors, save_pretrained,
                                 write_safetensors)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.float16),
           "brain": torch.full((2,), 1.5, dtype=torch.bfloat16), "scalar": torch.tensor(7),
           "empty": torch.empty(0, 4)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_files_of_the_safetensors_package_are_read(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "x.safetensors")
    assert_same(read_safetensors(tmp_path / "x.safetensors"), TENSORS)


def test_our_files_are_read_by_the_safetensors_package(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", TENSORS)
    assert_same(safetensors.torch.load_file(tmp_path / "x.safetensors"), TENSORS)


def file_with(entry, data=b"\0" * 8):
    header = json.dumps({"t": entry}).encode()
    return len(header).to_bytes(8, "little") + header + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("content", [
    b"", b"\x05\0\0", (2**63).to_bytes(8, "little") + b"{}", (4).to_bytes(8, "little") + b"[1]x",
    file_with(GOOD, data=b"\0" * 7),  # cut
    file_with(GOOD | {"shape": [3]}), file_with(GOOD | {"shape": [-2]}),
    file_with(GOOD | {"data_offsets": [8, 0]}), file_with(GOOD | {"data_offsets": [-8, 0]}),
    file_with(GOOD | {"dtype": "F99"}), file_with({"dtype": "F32"}), file_with("text"),
    file_with(GOOD | {"shape": "2"}), file_with(GOOD | {"data_offsets": [0, 4, 8]}),
    file_with(GOOD | {"data_offsets": [False, 8]}), file_with(GOOD | {"shape": [2.0]}),
    file_with(GOOD | {"shape": [0, 2**63], "data_offsets": [0, 0]}),
    file_with(GOOD | {"shape": [2**61, 2**61, 0], "data_offsets": [0, 0]}),
])
def test_a_broken_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.safetensors"):
        read_safetensors(path)


class Malicious:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_a_pickle_with_code_is_not_run(tmp_path, monkeypatch, random_folder):
    """Only safetensors are read: pytorch_model.bin, whatever it holds, is not opened."""
    monkeypatch.chdir(tmp_path)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(random_folder / name, tmp_path)
    torch.save({"t": Malicious()}, "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="model.safetensors: no such file"):
        load_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------ the hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(random_folder):
    """(address, {path: file}) of a server that answers as the hub does for single files."""
    files = {f"/org/name/resolve/main/{path.name}": path.read_bytes() for path in random_folder.iterdir()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self, body=True):
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
                content = b""
            self.send_header("ETag", '"' + hashlib.sha1(content).hexdigest() + '"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_HEAD(self):
            self.do_GET(body=False)

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", files
    httpd.shutdown()
    httpd.server_close()


def load_by_name(name, cache, **environment):
    """(exit status, last line) of loading a checkpoint by its hub name in a process of its own."""
    environment = {"HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    code = ("import sys\nfrom plumbing.checkpoint import load_pretrained\n"
            f"try:\n    print(load_pretrained({name!r})[0].word_embeddings.weight.sum().item())\n"
            "except (ValueError, OSError) as error:\n    sys.exit(str(error))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          cwd=Path(__file__).resolve().parents[1], env=inherited | environment)
    return done.returncode, (done.stdout + done.stderr).strip().splitlines()


def test_a_hub_name_is_fetched_once_and_then_found_offline(hub, random_folder, tmp_path):
    address, files = hub
    expected = load_pretrained(random_folder)[0].word_embeddings.weight.sum().item()
    status, lines = load_by_name("org/name", tmp_path, HF_ENDPOINT=address)
    assert (status, float(lines[-1])) == (0, pytest.approx(expected)), lines
    files.clear()
    status, lines = load_by_name("org/name", tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert (status, float(lines[-1])) == (0, pytest.approx(expected)), lines


@pytest.mark.parametrize("name, environment", [
    ("roberta-base", {"HF_HUB_OFFLINE": "1"}),
    pytest.param("org/name", {"HF_ENDPOINT": "http://127.0.0.1:9"}, marks=pytest.mark.slow),  # 30 s of tries
])
def test_a_hub_that_cannot_be_reached_is_one_line_that_names_the_flag(name, environment, tmp_path):
    status, lines = load_by_name(name, tmp_path, **environment)
    assert status == 1 and len(lines) == 2, lines  # the first says what is being tried
    assert lines[1].startswith(f"--model {name}: ") and "give --model the path of a local folder" in lines[1]


def test_the_pooling_file_of_the_hub_is_fetched(hub, random_folder, tmp_path):
    address, files = hub
    files["/org/name/resolve/main/1_Pooling/config.json"] = b'{"pooling_mode_max_tokens": true}'
    status, lines = load_by_name("org/name", tmp_path, HF_ENDPOINT=address)
    assert status == 1 and "choose by --pooling first or mean" in lines[-1]


def test_a_hub_folder_without_a_tokenizer_is_refused_by_the_name_of_the_file(hub, tmp_path):
    address, files = hub
    del files["/org/name/resolve/main/tokenizer.json"]
    status, lines = load_by_name("org/name", tmp_path, HF_ENDPOINT=address)
    assert status == 1 and len(lines) == 2
    assert lines[1].startswith("--model org/name: no such folder, and the hub does not give tokenizer.json")


def test_weights_in_several_files_are_refused_by_name(random_folder, tmp_path):
    for path in random_folder.iterdir():
        new = "model-00001-of-00002.safetensors" if path.suffix == ".safetensors" else path.name
        (tmp_path / new).write_bytes(path.read_bytes())
    with pytest.raises(FileNotFoundError, match="in shards are not read"):
        load_pretrained(tmp_path)


SIZES = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 1,
         "max_position_embeddings": 4}


def test_a_roberta_config_without_a_padding_token_has_number_one_and_bert_has_zero():
    """The defaults of transformers, which leaves them out of the file."""
    for model_type, pad in (("roberta", 1), ("bert", 0)):
        assert check_config(SIZES | {"model_type": model_type}, "config.json").pad_token_id == pad


@pytest.mark.parametrize("name, least", [(name, 1) for name in SIZES] + [("type_vocab_size", 0), ("pad_token_id", 0)])
def test_a_size_may_be_as_small_as_it_makes_sense_and_no_smaller(name, least):
    sizes = SIZES | {"model_type": "bert"}
    assert getattr(check_config(sizes | {name: least}, "config.json"), name) == least
    with pytest.raises(ValueError, match=f"config.json: {name} is {least - 1}; expected int, {least} or more"):
        check_config(sizes | {name: least - 1}, "config.json")


def test_the_padding_token_is_one_of_the_vocabulary():
    for pad, fits in ((8, True), (9, False)):
        try:
            assert check_config(SIZES | {"model_type": "bert", "pad_token_id": pad}, "config.json").pad_token_id == 8
            assert fits
        except ValueError as error:
            assert not fits and "pad_token_id is 9; expected below vocab_size" in str(error)


# ------------------------------------------------------------------------------------ checkpoints of others


def real_sentences():
    """800 sentences of real corpora, where there are any."""
    rows = []
    for name, count in (("mrpc", 250), ("cola", 150), ("sst2", 100), ("amazon", 100), ("boolq", 100), ("wic", 100)):
        if place := find_data(name):
            rows += islice(corpus_sources(name, place)["train"](), count)
    return [text_b or text_a for _, text_a, text_b, _ in rows if text_a is not None]


def odd_sentences(count=200):
    """Emoji and their joiners, accents composed and not, CJK, right to left, control characters, spaces."""
    rng = random.Random(0)
    pieces = ["🙂", "👩‍👩‍👧", "🇯🇵", "é", "e\u0301", "Å", "ß", "ﬁ", "東京", "한국어", "ไทย", "שלום", "مرحبا", "\x00", "\x07",
              "\u200b", "\ufeff", "\u00ad", "\ufffd", "\u2028", "\x85", "\t", "\r", "\xa0", "\u3000", " ", "  ", "don't",
              "C++", "<s>", "[SEP]", "[unused1]", "</s>", "...", "—", "word", "Word", "WORDS", "x" * 120, "𝔘𝔫𝔦", "½", "№"]
    return ["".join(rng.choices(pieces, k=rng.randrange(1, 30))) + "a" for _ in range(count)]


@pytest.mark.parametrize("name", ["minilm", "roberta"])
@pytest.mark.parametrize("max_length", [48, 128])
def test_token_ids_of_a_thousand_sentences_equal_those_of_transformers(name, max_length, request):
    """Singles and pairs. Truncation takes from the longer text of a pair first, and keeps special tokens."""
    folder = request.getfixturevalue(name)
    _, tokenizer = load_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = SENTENCES + odd_sentences() + real_sentences()
    rows = [(a, None) for a in sentences] + list(zip(sentences, sentences[7:]))
    split = encode(tokenizer, [(a, b, 0) for a, b in rows], max_length)
    longest = 0
    for ours, (a, b) in zip((sample(split, i) for i in range(len(split))), rows, strict=True):
        expected = theirs(a, b, truncation="longest_first", max_length=max_length)
        assert ours["input_ids"] == expected["input_ids"], (a, b)
        assert ours["token_type_ids"] == expected.get("token_type_ids", [0] * len(ours["input_ids"])), (a, b)
        longest = max(longest, len(ours["input_ids"]))
    assert longest == max_length  # some were cut


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("variant", ["bare", "masked-lm", "float16", "sentence-transformers"])
def test_checkpoints_as_others_save_them_load_alike(kind, variant, tmp_path):
    """Written by transformers, read here, same hidden states; of float16 files, those of the rounded weights."""
    bert = kind == "bert"
    sizes = {"vocab_size": 282, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 96, "max_position_embeddings": 40, "initializer_range": 0.2,
             "type_vocab_size": 2 if bert else 1, "pad_token_id": 0 if bert else 1}
    config = (transformers.BertConfig if bert else transformers.RobertaConfig)(**sizes)
    names = {True: ("BertModel", "BertForMaskedLM"), False: ("RobertaModel", "RobertaForMaskedLM")}[bert]
    torch.manual_seed(0)
    model = getattr(transformers, names[variant == "masked-lm"])(config)
    folder = tmp_path / "0_Transformer" if variant == "sentence-transformers" else tmp_path
    model = model.half() if variant == "float16" else model
    model.save_pretrained(folder)
    tiny.make_tokenizer().save(str(folder / "tokenizer.json"))
    if variant != "sentence-transformers":
        (tmp_path / "0_Transformer").mkdir()  # of no meaning beside a config.json
    else:
        (tmp_path / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "0_Transformer", "type": "x"}]')
    ours, _ = load_pretrained(tmp_path)
    theirs = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(5, 282, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.tensor([[12], [7], [3]])).long()
    ids = torch.where(mask == 1, ids, config.pad_token_id)
    with torch.no_grad():
        found = ours.eval()(ids, mask, torch.zeros_like(ids))
        expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    assert ((found - expected) * mask.unsqueeze(2)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["DistilBert", "Albert", "Deberta", "Electra", "MPNet"])
def test_an_architecture_that_is_not_supported_is_refused_by_name(kind, tmp_path):
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model_type is '{kind.lower()}'; supported: bert, roberta"):
        load_pretrained(tmp_path)


def test_what_is_saved_is_what_is_loaded(encoder, batch, tmp_path, random_folder):
    _, tokenizer = load_pretrained(random_folder)
    save_pretrained(tmp_path, encoder.float(), tokenizer)
    loaded, same_tokenizer = load_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(**batch), encoder(**batch))
    assert same_tokenizer.to_str() == tokenizer.to_str()


def test_a_saved_encoder_opens_in_transformers(random_folder, batch):
    ours, _ = load_pretrained(random_folder)
    theirs = transformers.AutoModel.from_pretrained(random_folder).eval()
    with torch.no_grad():
        difference = ours.eval()(**batch) - theirs(**batch).last_hidden_state
    assert difference.abs().max() < 2e-5


def test_old_names_load_alike(minilm, tmp_path):
    """Checkpoints of the first releases: `bert.` in front, gamma and beta in LayerNorm."""
    encoder, _ = load_pretrained(minilm)
    state = transformers.AutoModel.from_pretrained(minilm).state_dict()
    old = {"bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma")
           .replace("LayerNorm.bias", "LayerNorm.beta"): t for name, t in state.items()}
    write_safetensors(tmp_path / "model.safetensors", old | {"cls.predictions.bias": torch.zeros(3)})
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((minilm / name).read_bytes())
    loaded, _ = load_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), encoder.parameters()))


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("encoder.layer.1.output.dense.bias"), "encoder.layer.1.output.dense.bias.*missing"),
    (lambda s: s.update({"encoder.layer.2.output.dense.bias": torch.zeros(64)}), "layer.2.*no place"),
    (lambda s: s.update({"embeddings.LayerNorm.bias": torch.zeros(7)}), r"embeddings.LayerNorm.*\(7,\)"),
])
def test_a_tensor_missing_left_over_or_misshapen_is_named(random_folder, tmp_path, change, message):
    from plumbing.checkpoint import read_safetensors, write_safetensors
    state = read_safetensors(random_folder / "model.safetensors")
    change(state)
    write_safetensors(tmp_path / "model.safetensors", state)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((random_folder / name).read_bytes())
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("change, message", [
    ('"model_type": "bert"', '"model_type": "gpt2"', ),
    ('"hidden_act": "gelu"', '"hidden_act": "relu"'),
    ('"position_embedding_type": "absolute"', '"position_embedding_type": "relative_key"'),
    ('"hidden_size": 64', '"hidden_size": "wide"'),
    ('"hidden_size": 64,', ''),
    ('"hidden_size": 64', '"hidden_size": 64.0'),
    ('"num_attention_heads": 4', '"num_attention_heads": 0'),
    ('"pad_token_id": 0', '"pad_token_id": 9999'),
    ('"hidden_dropout_prob": 0.1', '"hidden_dropout_prob": 1.5'),
    ('{', '['),
])
def test_a_config_this_encoder_cannot_follow_is_refused(random_folder, tmp_path, change, message):
    for file in random_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (tmp_path / "config.json").read_text()
    assert change in text
    (tmp_path / "config.json").write_text(text.replace(change, message))
    with pytest.raises(ValueError, match="config.json"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("modes, expected", [
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
    ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
    ({"embedding_dimension": 64, "pooling_mode": "mean", "include_prompt": True}, "mean"),
    ({"pooling_mode": "cls"}, "first"), ({"pooling_mode": "max"}, "true is pooling_mode max; expected one of"),
    ({"pooling_mode_max_tokens": True}, "true is pooling_mode_max_tokens; expected one of"),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls_token and pooling_mode_mean_tokens;"),
    ({}, "true is no pooling_mode")])
@pytest.mark.parametrize("inside", [False, True])
def test_auto_takes_the_pooling_of_the_folder(random_folder, tmp_path, modes, expected, inside):
    """Beside the checkpoint, or above it in a sentence-transformers folder; --pooling overrides it."""
    folder = tmp_path / "0_Transformer" if inside else tmp_path
    shutil.copytree(random_folder, folder, dirs_exist_ok=True)
    assert load_pretrained(folder)[0].config.pooling == "first"  # as in the paper, where nothing is said
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    (tmp_path / "modules.json").write_text(json.dumps([{"path": folder.name if inside else ""}]))
    assert load_pretrained(folder, "mean")[0].config.pooling == "mean"
    if expected in ("first", "mean"):
        assert load_pretrained(folder)[0].config.pooling == expected
    else:
        with pytest.raises(ValueError, match=expected):
            load_pretrained(folder)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_a_saved_encoder_keeps_its_pooling(random_folder, tmp_path, pooling):
    encoder, tokenizer = load_pretrained(random_folder, pooling)
    save_pretrained(tmp_path, encoder, tokenizer)
    assert load_pretrained(tmp_path)[0].config == encoder.config
    assert (tmp_path / "1_Pooling" / "config.json").is_file() == (pooling == "mean")


def test_a_folder_that_has_its_config_is_whole(random_folder, tmp_path, monkeypatch):
    """config.json is written last: lab.reproduce takes an encoder that has one for finished."""
    encoder, tokenizer = load_pretrained(random_folder)
    written = []
    monkeypatch.setattr(checkpoint, "write_text", lambda path, text: written.append(path.name))
    save_pretrained(tmp_path, encoder, tokenizer)
    assert written[-1] == "config.json" and (tmp_path / "model.safetensors").is_file()
