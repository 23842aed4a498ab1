"""A trained classifier as files: a run folder for `predict.py`, and folders that other tools open.

    save_classifier, load_classifier    model.safetensors, tokenizer.json, classifier.json
    export_classifier                   for transformers (AutoModel), peft (PeftModel), anyone's head
"""
import copy
import math
from dataclasses import asdict
from pathlib import Path

import torch

from data import tiny
from model import Classifier, Encoder, LoRALinear, add_lora, has_lora, merge_lora
from plumbing.checkpoint import (check_config, read_safetensors, read_tokenizer, save_pretrained,
                                 write_safetensors)
from plumbing.files import read_json, write_arrays, write_json, write_text


def lora_settings(encoder):
    """(r, lora_alpha) of an encoder with LoRA, else None."""
    for module in encoder.modules():
        if isinstance(module, LoRALinear):
            return module.lora_A.out_features, module.scaling * module.lora_A.out_features


def save_classifier(folder, model, tokenizer, task, temperature, max_length, data, temperature_reason=None):
    """Write all that load_classifier needs; LoRA matrices stay apart from the weights they adapt.

    temperature_reason: why the temperature is 1, if it was not fitted.
    """
    write_safetensors(folder / "model.safetensors", model.state_dict())
    tokenizer.no_truncation()
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    content = {"data": data, "pairs": task.pairs, "labels": task.labels, "temperature": temperature,
               "temperature_reason": temperature_reason, "max_length": max_length,
               "lora": lora_settings(model.encoder), "encoder": asdict(model.encoder.config)}
    write_json(folder / "classifier.json", content)


def save_run(args, model, tokenizer, task, result):
    """All that a finished run leaves: weights, --export, logits, result.json."""
    write_arrays(args.out / "logits.npz", **result.pop("logits"))
    temperature = result["temperature"]
    save_classifier(args.out, model, tokenizer, task, temperature, args.max_length, args.data,
                    result["temperature_reason"])
    if args.export:
        base = tiny.ENCODER if args.model == "tiny" else args.model
        export_classifier(args.export, model, tokenizer, task, temperature, args.max_length, base)
    write_json(args.out / "result.json", result)  # last: a folder that has it is finished


def save_unfinished(args, model, tokenizer, task, error):
    """Keep the best weights of a training that became infinite (NotFinite); returns what to say of them."""
    if not error.kept:
        (args.out / "state").unlink(missing_ok=True)  # of epoch 0: nothing to go on with
        return ""
    save_classifier(args.out, model, tokenizer, task, 1.0, args.max_length, args.data,
                    "training ended before its last epoch")
    return f"; the best weights before are in {args.out}"


def load_classifier(folder):
    """(Classifier in eval mode, Tokenizer, dict of classifier.json) of a run folder.

    Raises FileNotFoundError or ValueError for a folder that save_classifier did not finish.
    """
    folder = Path(folder)
    path, weights = folder / "classifier.json", folder / "model.safetensors"
    if not path.is_file() or not weights.is_file():
        missing = weights if path.is_file() else path
        raise FileNotFoundError(f"{folder}: no {missing.name}; expected the folder of a run of train.py that "
                                "came to its end")
    content = read_json(path)
    try:
        config = check_config(content["encoder"], path)
        model = Classifier(Encoder(config), len(content["labels"]))
        if content["lora"]:
            add_lora(model.encoder, *content["lora"])
        if not (0 < content["temperature"] < math.inf and 1 < content["max_length"] <= config.max_length):
            raise ValueError("temperature or max_length is out of range")
        content["pairs"], content["data"]  # KeyError where they are missing
        content.setdefault("temperature_reason", None)  # earlier runs have none
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{path}: not what train.py writes ({type(error).__name__}: {reason})") from None
    try:
        model.load_state_dict(read_safetensors(weights))
    except RuntimeError as error:  # torch lists every tensor
        reason = str(error).splitlines()[1].strip()[:200]
        raise ValueError(f"{weights}: does not fit {path.name} ({reason})") from None
    return model.eval(), read_tokenizer(folder / "tokenizer.json", config.vocab_size), content


def export_classifier(folder, model, tokenizer, task, temperature, max_length, base):
    """Write the result for other tools.

    config.json, model.safetensors        AutoModel.from_pretrained(folder); LoRA is merged
    tokenizer.json, tokenizer_config.json AutoTokenizer.from_pretrained(folder)
    head.safetensors                      weight V (C, h), bias b (C,), temperature ()
    adapter/                              with LoRA: PeftModel.from_pretrained(encoder, it)
    1_Pooling/config.json                 if phi is the mean over tokens

    softmax((V phi + b) / temperature), with phi the last hidden state of the first token or the mean over
    tokens, are the probabilities. `base` names the encoder that the adapter belongs to.
    """
    encoder = copy.deepcopy(model.encoder)
    if has_lora(encoder):
        merge_lora(encoder)
        export_adapter(folder / "adapter", model.encoder, base)
    save_pretrained(folder, encoder, tokenizer, task.labels, max_length)
    write_safetensors(folder / "head.safetensors", {"weight": model.head.weight, "bias": model.head.bias,
                                                    "temperature": torch.tensor(temperature)})


def export_adapter(folder, encoder, base):
    """The LoRA matrices of an encoder as a peft folder."""
    folder.mkdir(parents=True, exist_ok=True)
    r, lora_alpha = lora_settings(encoder)
    tensors = {}
    for name, tensor in encoder.state_dict().items():
        if ".lora_" in name:
            theirs = name.replace("layers.", "layer.").replace("attention.", "attention.self.")
            tensors[f"base_model.model.encoder.{theirs}"] = tensor
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "r": r, "lora_alpha": lora_alpha,
              "lora_dropout": 0.0, "bias": "none", "target_modules": ["query", "value"],
              "inference_mode": True, "base_model_name_or_path": str(base)}
    write_json(folder / "adapter_config.json", config)
