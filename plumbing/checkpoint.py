"""Files of tensors: the safetensors format, read and written here, and what lies beside it.

Apart from `model.py` because it is about files, not about the method: `model.load_pretrained` says
which tensors an encoder needs, this file gets them off the disk. Only tensors are ever loaded,
never code. Every function raises ValueError (or FileNotFoundError) with the file's name in it.
"""

import json
import math
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer

from plumbing.run_folder import write_whole

INDEX = "model.safetensors.index.json"  # of a sharded checkpoint: which tensor is in which file


def find_checkpoint(name):
    """The folder of a checkpoint: a folder here, or else files of that name from the Hugging Face hub.

    In a sentence-transformers folder it is that of its first module. Files of the hub go through
    huggingface_hub and its cache; HF_HUB_OFFLINE=1 uses the cache alone.
    """
    folder = Path(name)
    if folder.is_dir():
        modules = folder / "modules.json"
        if modules.is_file() and not (folder / "config.json").is_file():
            try:
                folder = folder / json.loads(modules.read_text(encoding="utf-8"))[0]["path"]
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise ValueError(f"{modules}: not a list of modules with paths ({error})") from None
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)):
        raise FileNotFoundError(f"{name}: no such folder; --model takes one with a checkpoint, or a hub name")
    return download_checkpoint(str(name))


def download_checkpoint(name):
    """The cache folder with the files of `name` from the hub; one sentence where that fails."""
    # here, as a local run needs none of it
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    print(f"checkpoint {name}: from the Hugging Face hub or its cache", flush=True)
    logging.set_verbosity_error()  # it tries for half a minute; a warning for each try says nothing more

    def fetch(*alternatives):
        unreachable = None
        for file in alternatives:
            try:
                return Path(hf_hub_download(name, file))
            except LocalEntryNotFoundError as error:
                unreachable = error  # not in the cache, so not known to be absent: another may be there
            except EntryNotFoundError:
                continue
        if unreachable:
            raise unreachable
        raise FileNotFoundError(f"--model {name}: on the hub it has no {' and no '.join(alternatives)}")

    try:
        fetch("config.json")
        fetch("tokenizer.json")
        weights = fetch("model.safetensors", INDEX, "pytorch_model.bin")
        for shard in read_index(weights) if weights.name == INDEX else ():
            fetch(shard)
    except (OSError, ValueError, RuntimeError) as error:  # huggingface_hub's and httpx's are among these
        if str(error).startswith("--model"):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"--model {name}: no such folder, and the hub does not give it ({reason}); "
                                "give --model the path of a local folder with the checkpoint") from None
    return weights.parent


def read_json(path):
    """The object in a JSON file, as a dict."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint folder holds config.json, tokenizer.json "
                                "and model.safetensors or pytorch_model.bin")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def read_tokenizer(path, vocab_size):
    """tokenizer.json; ValueError where it does not fit the vocab_size rows of word embeddings."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint folder needs the fast tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception, whatever is wrong
        raise ValueError(f"{path}: not a tokenizers file ({error})") from None
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(f"{path}: {tokenizer.get_vocab_size()} tokens, but config.json has "
                         f"vocab_size {vocab_size}")
    if tokenizer.num_special_tokens_to_add(False) == 0:
        raise ValueError(f"{path}: adds no special tokens, so there is no first token to read")
    return tokenizer


def read_weights(directory):
    """({name: tensor}, path) from model.safetensors, from its shards, or else from pytorch_model.bin."""
    path = directory / "model.safetensors"
    if path.is_file():
        return read_safetensors(path), path
    path = directory / INDEX
    if path.is_file():
        weights = {}
        for shard in read_index(path):
            if not (directory / shard).is_file():
                raise FileNotFoundError(f"{path}: names {shard}, which is not in the folder")
            weights |= read_safetensors(directory / shard)
        return weights, path
    path = directory / "pytorch_model.bin"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: no model.safetensors, no {INDEX} and no pytorch_model.bin")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)  # tensors, never code
    except Exception as error:  # torch raises many types for a damaged or an unsafe file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a file of tensors ({reason})") from None
    if not isinstance(weights, dict) or not all(torch.is_tensor(t) for t in weights.values()):
        raise ValueError(f"{path}: expected a dict of tensors, found {type(weights).__name__}")
    return weights, path


def read_index(path):
    """Names of the files that a sharded checkpoint consists of."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(file, str) and Path(file).name == file
                                               for file in shards.values()):
        raise ValueError(f"{path}: weight_map is no object of tensor names and file names")
    return sorted(set(shards.values()))


SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}


def read_safetensors(path):
    """{name: tensor} of a .safetensors file; ValueError where the file contradicts itself.

    The format: 8 bytes with the header's length (little-endian), the header as JSON
    {name: {dtype, shape, data_offsets: [begin, end]}}, then the raw bytes of all tensors.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > size - 8:
            raise ValueError(f"{path}: not a whole safetensors file: {size} bytes, "
                             f"header of {header_size}")
        data_size = size - 8 - header_size
        try:
            header = json.loads(file.read(header_size).decode("utf-8"))
            header.pop("__metadata__", None)
            entries = []
            for name, entry in header.items():
                begin, end = map(int, entry["data_offsets"])
                shape = list(map(int, entry["shape"]))
                if [begin, end, shape] != [*entry["data_offsets"], entry["shape"]]:
                    raise ValueError(f"tensor {name!r} has a shape or an offset that is no integer")
                entries.append((name, SAFETENSORS_DTYPES[entry["dtype"]], shape, begin, end))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: broken safetensors header "
                             f"({type(error).__name__}: {error})") from None
        tensors = {}
        for name, dtype, shape, begin, end in entries:
            needed = math.prod(shape) * dtype.itemsize
            sane = all(0 <= size < 2**62 for size in shape) and begin >= 0
            if not sane or end > data_size or end - begin != needed:
                raise ValueError(f"{path}: tensor {name!r} of shape {shape} claims bytes {begin} to "
                                 f"{end}; it needs {needed} and the file holds {data_size}")
            buffer = bytearray(needed)
            file.seek(8 + header_size + begin)
            file.readinto(buffer)
            tensors[name] = (torch.frombuffer(buffer, dtype=dtype) if needed
                             else torch.empty(0, dtype=dtype)).reshape(shape)
    return tensors


def write_safetensors(path, tensors):
    """Write {name: tensor} in the format that read_safetensors describes, whole or not at all."""
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
    head = json.dumps(header).encode("utf-8")
    head += b" " * (-len(head) % 8)  # the data start at a multiple of 8 bytes
    with write_whole(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(raw.numpy().tobytes())
