"""Files that are whole or absent: text, JSON, arrays, tensors with a checksum. Code is never loaded."""

import hashlib
import io
import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch


@contextmanager
def write_whole(path):
    """A binary file to write to that takes the name `path` when all of it is on the disk, or never."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the new name with nothing in it
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None  # write() does not say which file
        raise


def write_text(path, text):
    with write_whole(path) as file:
        file.write(text.encode("utf-8"))


def write_lines(path, records, indent=None):
    """One JSON value a line; JSON has no NaN and no infinity: null."""
    records = [json.loads(json.dumps(record), parse_constant=lambda name: None) for record in records]
    write_text(path, "".join(json.dumps(record, indent=indent) + "\n" for record in records))


def write_json(path, content):
    write_lines(path, [content], indent=2)


def write_arrays(path, **arrays):
    """A file for numpy.load."""
    with write_whole(path) as file:
        np.savez(file, **arrays)


def save_tensors(path, content):
    """Write a dict of tensors, numbers, strings, lists and dicts: torch.save's bytes, then their SHA-256."""
    buffer = io.BytesIO()  # torch.save into a file hides the reason where the disk is full
    torch.save(content, buffer)
    with write_whole(path) as file:
        file.write(buffer.getbuffer())
        file.write(hashlib.sha256(buffer.getbuffer()).digest())


def load_tensors(path):
    """What save_tensors wrote, on the CPU. ValueError for a damaged file.

    The checksum finds every cut and every flipped bit. Against files made to harm it is no help, but
    weights_only=True is: it builds tensors and plain values and runs nothing.
    """
    data = memoryview(Path(path).read_bytes())
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise ValueError(f"{path}: is cut or damaged (its checksum is not that of its {len(data)} bytes); "
                         "delete it to start from the beginning")
    try:
        content = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
        content["start"]
        return content
    except Exception as error:  # torch raises many types for what is not its own
        raise ValueError(f"{path}: not a state that train.py wrote ({type(error).__name__})") from None


def read_json(path):
    """The object in a JSON file, as a dict."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
