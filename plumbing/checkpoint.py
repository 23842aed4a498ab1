"""Checkpoint files: BERT and RoBERTa folders read and written, and the safetensors format.

    load_pretrained(folder or hub name) -> (Encoder, Tokenizer)

Read in order: load_pretrained says which tensors an encoder needs, the rest gets them off the disk. Only
tensors are ever loaded, never code. Every function raises ValueError (or FileNotFoundError) with the file's
name in it.
"""

import json
import math
import re
from dataclasses import asdict, fields
from pathlib import Path

import torch
from tokenizers import Tokenizer

from data import tiny
from model import Encoder, EncoderConfig, has_lora
from plumbing.files import read_json, write_text, write_whole

# Hugging Face's module names beside ours; the second table is for one layer of the stack.
EMBEDDING_NAMES = {"embeddings.word_embeddings": "word_embeddings", "embeddings.LayerNorm": "embedding_norm",
                   "embeddings.position_embeddings": "position_embeddings",
                   "embeddings.token_type_embeddings": "token_type_embeddings"}
LAYER_NAMES = {"attention.self.query": "attention.query", "attention.self.key": "attention.key",
               "attention.self.value": "attention.value", "attention.output.dense": "attention.output",
               "attention.output.LayerNorm": "attention_norm", "intermediate.dense": "ffn_in",
               "output.dense": "ffn_out", "output.LayerNorm": "ffn_norm"}
SPECIAL_TOKENS = {f"{name}_token": (roberta, f"[{name.upper()}]") for name, roberta in {
    "cls": "<s>", "sep": "</s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}.items()}
POOLING_FILE = Path("1_Pooling/config.json")  # of sentence-transformers
# Parts of a checkpoint that the classifier does not use: pooler, MLM heads, a buffer of old files.
UNUSED = ("pooler.", "cls.", "lm_head.", "embeddings.position_ids")


def huggingface_names(encoder):
    """The Hugging Face name of every parameter of `encoder`: {theirs: ours}."""
    modules = dict(EMBEDDING_NAMES)
    for i in range(len(encoder.layers)):
        for theirs, ours in LAYER_NAMES.items():
            modules[f"encoder.layer.{i}.{theirs}"] = f"layers.{i}.{ours}"
    own = encoder.state_dict()
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in modules.items()
            for kind in ("weight", "bias") if f"{ours}.{kind}" in own}


def load_pretrained(name, pooling="auto"):
    """Read a BERT or RoBERTa checkpoint, a folder or a hub name, as (Encoder, tokenizers.Tokenizer).

    pooling: "first" or "mean" over tokens is phi; "auto" asks the checkpoint (read_pooling).

    Needs config.json, tokenizer.json and model.safetensors; saved as a bare encoder, with an MLM head or by
    sentence-transformers. Raises FileNotFoundError for a missing file, ValueError for an architecture that is
    not supported and for a tensor that is missing, left over or of the wrong shape.
    """
    directory = find_checkpoint(name, pooling)
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint folder holds config.json, "
                                "tokenizer.json and model.safetensors")
    config = check_config(read_json(path), path)
    config.pooling = read_pooling(directory) if pooling == "auto" else pooling
    path = directory / "model.safetensors"
    weights = read_safetensors(path)
    try:
        encoder = Encoder(config)
    except (ValueError, RuntimeError) as error:  # heads that do not divide the width; sizes beyond memory
        raise ValueError(f"{directory / 'config.json'}: {str(error).splitlines()[0]}") from None
    names, state = huggingface_names(encoder), {}
    for name, tensor in weights.items():
        plain = name.removeprefix("bert.").removeprefix("roberta.")
        plain = plain.replace(".gamma", ".weight").replace(".beta", ".bias")  # names of the first releases
        if not plain.startswith(UNUSED):
            if plain not in names:
                raise ValueError(f"{path}: tensor {name!r} has no place in a {config.model_type} encoder "
                                 f"of {config.num_hidden_layers} layers")
            state[names[plain]] = tensor
    for theirs, ours in names.items():
        expected = encoder.get_parameter(ours).shape
        if ours not in state:
            raise ValueError(f"{path}: tensor {theirs!r} is missing")
        if state[ours].shape != expected:
            raise ValueError(f"{path}: tensor {theirs!r} has shape {tuple(state[ours].shape)}, "
                             f"config.json makes it {tuple(expected)}")
    encoder.load_state_dict(state)  # copies into float32, whatever the file holds
    return encoder, read_tokenizer(directory / "tokenizer.json", config.vocab_size)


def save_pretrained(directory, encoder, tokenizer, labels=None, max_length=None, **more):
    """Write `encoder` (without LoRA) and `tokenizer` for load_pretrained, AutoModel and AutoTokenizer.

    config.json, in which `more` goes too, is written last: a folder that has it is whole.
    """
    if has_lora(encoder):
        raise ValueError("this encoder has LoRA; merge_lora(encoder) first")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = encoder.state_dict()
    names = huggingface_names(encoder)
    write_safetensors(directory / "model.safetensors", {n: state[ours] for n, ours in names.items()})
    config = asdict(encoder.config) | {"hidden_act": "gelu", "position_embedding_type": "absolute"} | more
    if config.pop("pooling") == "mean":
        (directory / POOLING_FILE).parent.mkdir(exist_ok=True)
        write_text(directory / POOLING_FILE, json.dumps({
            "word_embedding_dimension": encoder.config.hidden_size, "pooling_mode_mean_tokens": True}) + "\n")
    if labels:
        config |= {"id2label": dict(enumerate(labels)), "label2id": dict(zip(labels, range(len(labels))))}
    # Without this class transformers would build a lower-casing tokenizer of its own from the vocabulary.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": max_length or encoder.config.max_length,
                "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    for name, spellings in SPECIAL_TOKENS.items():
        settings |= {name: token for token in spellings if tokenizer.token_to_id(token) is not None}
    tokenizer.no_truncation()  # else the length of this run would be every later reader's
    write_text(directory / "tokenizer.json", tokenizer.to_str(pretty=True))
    for name, content in (("tokenizer_config.json", settings), ("config.json", config)):
        write_text(directory / name, json.dumps(content, indent=2) + "\n")


def check_config(raw, path):
    """The entries of a config.json, read from `path`, as an EncoderConfig; ValueError where it cannot be."""
    supported = {"model_type": ("bert", "roberta"), "hidden_act": ("gelu",), "is_decoder": (False,),
                 "position_embedding_type": ("absolute", None), "pooling": ("first", "mean")}
    for key, allowed in supported.items():
        value = raw.get(key, None if key == "model_type" else allowed[0])
        if value not in allowed:
            raise ValueError(f"{path}: {key} is {value!r}; supported: {', '.join(map(str, allowed))}")
    sizes = {field.name: raw[field.name] for field in fields(EncoderConfig) if field.name in raw}
    for name, value in sizes.items():
        kind = EncoderConfig.__annotations__[name]
        least = 0 if name in ("type_vocab_size", "pad_token_id") or kind is float else 1
        if kind is not str and (type(value) not in (int, kind) or not least <= value < 2**31):
            raise ValueError(f"{path}: {name} is {str(value)[:20]}; expected {kind.__name__}, {least} or "
                             "more")
        if name.endswith("_prob") and value >= 1:
            raise ValueError(f"{path}: {name} is {value!r}; expected a probability below 1")
    if sizes.get("pad_token_id", 0) >= sizes.get("vocab_size", 1):
        raise ValueError(f"{path}: pad_token_id is {sizes['pad_token_id']}; expected below vocab_size")
    if raw["model_type"] == "roberta" and "pad_token_id" not in raw:
        sizes["pad_token_id"] = 1  # RoBERTa's default in transformers
    try:
        return EncoderConfig(**sizes)
    except TypeError as error:  # a size without a default is not in the file
        raise ValueError(f"{path}: {str(error).removeprefix('EncoderConfig.__init__() ')}") from None


def read_pooling(directory):
    """What the pooling file of sentence-transformers beside the checkpoint says; without one "first"."""
    parent = directory.resolve().parent  # if `directory` is the Transformer inside its folder
    for path in (directory / POOLING_FILE, *[parent / POOLING_FILE] * (parent / "modules.json").is_file()):
        if path.is_file():
            entries = read_json(path)
            modes = [name for name, on in entries.items() if name.startswith("pooling_mode_") and on is True]
            if "pooling_mode" in entries:  # later versions
                modes.append(f"pooling_mode {entries['pooling_mode']}")
            known = {"pooling_mode_cls_token": "first", "pooling_mode_mean_tokens": "mean",
                     "pooling_mode cls": "first", "pooling_mode mean": "mean"}
            if len(modes) != 1 or modes[0] not in known:
                raise ValueError(f"{path}: true is {' and '.join(modes) or 'no pooling_mode'}; "
                                 f"expected one of {', '.join(known)}; choose by --pooling first or mean")
            return known[modes[0]]
    return "first"


# ---------------------------------------------------------------------------- files


def find_checkpoint(name, pooling="auto"):
    """The folder of a checkpoint: "tiny", a folder here, or else files of that name from the hub.

    Files of the hub go through huggingface_hub and its cache; HF_HUB_OFFLINE=1 uses the cache alone.
    """
    folder = tiny.ENCODER if name == "tiny" else Path(name)
    if folder.is_dir():
        inner = folder / "0_Transformer"  # where sentence-transformers may keep it
        return inner if inner.is_dir() and not (folder / "config.json").is_file() else folder
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)):
        raise FileNotFoundError(f"{name}: no such folder; --model takes one with a checkpoint, or a hub name")
    return download_checkpoint(str(name), pooling)


def download_checkpoint(name, pooling):
    """The cache folder with the files of `name` from the hub; one sentence where that fails."""
    # here, as a local run needs none of it
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    pooling_file = str(POOLING_FILE)
    print(f"checkpoint {name}: from the Hugging Face hub or its cache", flush=True)
    logging.set_verbosity_error()  # it tries for half a minute; a warning for each try says nothing more
    try:
        optional = [pooling_file] * (pooling == "auto")
        for file in ("tokenizer.json", *optional, "model.safetensors", "config.json"):
            try:
                path = Path(hf_hub_download(name, file))
            except EntryNotFoundError as error:
                unknown = isinstance(error, LocalEntryNotFoundError) and (  # the hub cannot be reached
                    try_to_load_from_cache(name, file) is not _CACHED_NO_EXIST)
                if file != pooling_file or unknown:  # most have no pooling file
                    raise
        return path.parent
    except (OSError, ValueError, RuntimeError) as error:  # huggingface_hub's and httpx's are among these
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        choose = ", or choose by --pooling first or mean" * (file == pooling_file)
        raise FileNotFoundError(f"--model {name}: no such folder, and the hub does not give {file} ({reason}"
                                f"); give --model the path of a local folder with it{choose}") from None


def read_tokenizer(path, vocab_size):
    """tokenizer.json; ValueError where it does not fit the vocab_size rows of word embeddings."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint folder needs the fast tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception, whatever is wrong
        raise ValueError(f"{path}: not a tokenizers file ({error})") from None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise ValueError(f"{path}: the largest token id is {largest}, but config.json has vocab_size "
                         f"{vocab_size}")
    if tokenizer.num_special_tokens_to_add(False) == 0:
        raise ValueError(f"{path}: adds no special tokens, so there is no first token to read")
    return tokenizer


SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                      "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
                      "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor} of a .safetensors file; ValueError where the file contradicts itself.

    The format: 8 bytes with the header's length (little-endian), the header as JSON
    {name: {dtype, shape, data_offsets: [begin, end]}}, then the raw bytes of all tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; weights in other formats or in shards are not read")
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > size - 8:
            raise ValueError(f"{path}: not a whole safetensors file: {size} bytes, header of {header_size}")
        data_size = size - 8 - header_size
        tensors = {}
        try:
            header = json.loads(file.read(header_size).decode("utf-8"))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                (begin, end), shape = entry["data_offsets"], entry["shape"]
                dtype = SAFETENSORS_DTYPES[entry["dtype"]]
                if not all(type(size) is int and 0 <= size < 2**62 for size in (begin, end, *shape)):
                    raise ValueError(f"tensor {name!r} has a shape or an offset that is no size")
                needed = math.prod(shape) * dtype.itemsize
                if end > data_size or end - begin != needed:
                    raise ValueError(f"tensor {name!r} of shape {shape} claims bytes {begin} to {end}; it "
                                     f"needs {needed} and the file holds {data_size}")
                buffer = bytearray(needed)
                file.seek(8 + header_size + begin)
                file.readinto(buffer)
                tensors[name] = (torch.frombuffer(buffer, dtype=dtype) if needed
                                 else torch.empty(0, dtype=dtype)).reshape(shape)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path}: broken safetensors header ({type(error).__name__}: {error})") from None
    return tensors


def write_safetensors(path, tensors):
    """Write {name: tensor} in the format that read_safetensors describes, whole or not at all."""
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": codes[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    head = json.dumps(header).encode("utf-8")
    head += b" " * (-len(head) % 8)  # the data start at a multiple of 8 bytes
    with write_whole(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(raw.numpy().tobytes())
