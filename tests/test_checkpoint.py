"""The safetensors reader: compatible with the format's own package, and closed to broken files."""

import json

import pytest
import safetensors.torch
import torch

from checkpoint import read_safetensors, read_weights, write_safetensors

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
