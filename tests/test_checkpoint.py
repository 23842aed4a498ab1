"""The safetensors reader: compatible with the format's own package, and closed to broken files."""

import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from plumbing.checkpoint import read_safetensors, read_weights, write_safetensors
from plumbing.checkpoint import check_config, load_pretrained

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
])
def test_a_broken_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.safetensors"):
        read_safetensors(path)


class Malicious:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"t": Malicious()}, "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        read_weights(tmp_path)
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


def test_shards_and_pickled_weights_are_fetched_where_there_is_no_whole_file(hub, random_folder, tmp_path):
    address, files = hub
    weights = read_safetensors(random_folder / "model.safetensors")
    prefix, expected = "/org/name/resolve/main/", weights["embeddings.word_embeddings.weight"].sum()
    del files[prefix + "model.safetensors"]
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    files[prefix + "pytorch_model.bin"] = buffer.getvalue()
    status, lines = load_by_name("org/name", tmp_path / "1", HF_ENDPOINT=address)
    assert (status, float(lines[-1])) == (0, pytest.approx(float(expected))), lines
    names = sorted(weights)
    for i, part in enumerate((names[:9], names[9:])):
        files[f"{prefix}part-{i}.safetensors"] = safetensors.torch.save({name: weights[name] for name in part})
    files[prefix + "model.safetensors.index.json"] = json.dumps(
        {"weight_map": {name: f"part-{int(name in names[9:])}.safetensors" for name in names}}).encode()
    files[prefix + "pytorch_model.bin"] = b"not read"
    status, lines = load_by_name("org/name", tmp_path / "2", HF_ENDPOINT=address)
    assert (status, float(lines[-1])) == (0, pytest.approx(float(expected))), lines


@pytest.mark.parametrize("name, environment", [
    ("roberta-base", {"HF_HUB_OFFLINE": "1"}),
    pytest.param("org/name", {"HF_ENDPOINT": "http://127.0.0.1:9"}, marks=pytest.mark.slow),  # 30 s of tries
])
def test_a_hub_that_cannot_be_reached_is_one_line_that_names_the_flag(name, environment, tmp_path):
    status, lines = load_by_name(name, tmp_path, **environment)
    assert status == 1 and len(lines) == 2, lines  # the first says what is being tried
    assert lines[1].startswith(f"--model {name}: ") and "give --model the path of a local folder" in lines[1]


def test_a_hub_folder_without_a_tokenizer_is_refused_by_the_name_of_the_file(hub, tmp_path):
    address, files = hub
    del files["/org/name/resolve/main/tokenizer.json"]
    status, lines = load_by_name("org/name", tmp_path, HF_ENDPOINT=address)
    assert status == 1 and lines[1:] == ["--model org/name: on the hub it has no tokenizer.json"]


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": "../x"}}', "{",
                                   '{"weight_map": {"a": "absent.safetensors"}}'])
def test_a_broken_index_of_shards_is_refused(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises((ValueError, OSError), match="model.safetensors.index.json"):
        read_weights(tmp_path)


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
