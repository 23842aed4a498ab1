"""Every number of a finished run, computed again from its weights and the data files, by numpy alone.

    python tests/recompute.py RUN_DIR [LP_RUN_DIR]        prints them as JSON

Nothing here is imported from the project: a line that is wrong there is not wrong here in the same way. Both
use two packages: `tokenizers` for the token ids, and torch, here for one thing, to draw the random head of FT
once more from its seed. All is in float64, and one text at a time, so there is no padding.

The head where an LP-FT run started is nowhere in its folder: it is that of the LP run with the same flags,
LP_RUN_DIR. BERT-type checkpoints, folders of .jsonl and CoLA's layout are known; the tests need no more.

Shapes: N samples, L tokens, C classes, h feature width.
"""

import json
import math
import sys
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

# ---------------------------------------------------------------------------- files


def read_tensors(path):
    """{name: array} of a .safetensors file of float32 tensors."""
    raw = Path(path).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F32", name
        begin, end = (start + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(raw[begin:end], np.float32).reshape(entry["shape"]).astype(np.float64)
    return tensors


# Hugging Face's names become the run's, in this order.
RENAMED = (("encoder.layer.", "layers."), ("attention.self.", "attention."),
           ("attention.output.dense", "attention.output"), ("attention.output.LayerNorm", "attention_norm"),
           ("intermediate.dense", "ffn_in"), ("output.dense", "ffn_out"), ("output.LayerNorm", "ffn_norm"),
           ("LayerNorm", "embedding_norm"))


@cache
def read_checkpoint(folder):
    """{our name: array} of a pre-trained encoder."""
    tensors = {}
    for name, tensor in read_tensors(Path(folder) / "model.safetensors").items():
        name = name.removeprefix("embeddings.")
        for theirs, ours in RENAMED:
            name = name.replace(theirs, ours)
        tensors[name] = tensor
    return tensors


def read_records(run):
    """The lines of metrics.jsonl: {"lp": record or None, epoch: record}."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"lp": None} | {record.get("epoch", "lp"): record for record in records}


def read_data(config):
    """({split: [(text or (text_a, text_b), label)]}, labels in the order of their indices)."""
    if config["data"] == "cola":
        folder = Path(config["data_dir"]) / "glue" / "CoLA"
        rows = {split: [line.split("\t") for line in (folder / file).read_text().splitlines()]
                for split, file in (("train", "train.tsv"), ("test", "dev.tsv"))}
        splits = {split: [(cells[3], cells[1]) for cells in of_split] for split, of_split in rows.items()}
    else:
        splits = {}
        for path in Path(config["data"]).glob("*.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            splits[path.stem.removeprefix("ood_")] = [
                (row.get("text") or (row["text_a"], row["text_b"]), row["label"]) for row in rows]
    if "val" not in splits:  # the last tenth
        kept = len(splits["train"]) - len(splits["train"]) // 10
        splits["train"], splits["val"] = splits["train"][:kept], splits["train"][kept:]
    return splits, sorted({label for _, label in splits["train"]})


@cache
def encode(model, max_length, texts):
    """[(token ids, token types)] of a tuple of texts or pairs."""
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    encodings = [tokenizer.encode(*([text] if isinstance(text, str) else text)) for text in texts]
    return [(encoding.ids, encoding.type_ids) for encoding in encodings]


# ---------------------------------------------------------------------------- the classifier

ERF_AT = np.linspace(-6, 6, 2**16 + 1)
ERF = np.array([math.erf(x) for x in ERF_AT])  # between two of these a straight line errs by 4e-9


def gelu(x):
    return 0.5 * x * (1 + np.interp(x / math.sqrt(2), ERF_AT, ERF))


def softmax(x):
    exps = np.exp(x - x.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def features_of(tensors, samples, heads, eps, scaling):
    """phi(x) of every sample, (N, h): the first token's last hidden state. `scaling` is LoRA's alpha / r."""
    def linear(name, x):
        if f"{name}.lora_A.weight" in tensors:
            A, B = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]  # (r, in), (out, r)
            return linear(f"{name}.linear", x) + scaling * (x @ A.T @ B.T)
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(1, keepdims=True)
        x = x / np.sqrt((x**2).mean(1, keepdims=True) + eps)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def split_heads(x):
        return x.reshape(len(x), heads, -1).transpose(1, 0, 2)  # (heads, L, h / heads)

    found = []
    for ids, types in samples:
        x = (tensors["word_embeddings.weight"][ids] + tensors["position_embeddings.weight"][:len(ids)]
             + tensors["token_type_embeddings.weight"][types])  # (L, h)
        x, layer = norm("embedding_norm", x), 0
        while f"layers.{layer}.ffn_in.weight" in tensors:
            at = f"layers.{layer}"
            query, key, value = (split_heads(linear(f"{at}.attention.{name}", x))
                                 for name in ("query", "key", "value"))
            weights = softmax(query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[2]))  # (heads, L, L)
            mixed = (weights @ value).transpose(1, 0, 2).reshape(len(x), -1)  # (L, h)
            x = norm(f"{at}.attention_norm", x + linear(f"{at}.attention.output", mixed))
            x = norm(f"{at}.ffn_norm", x + linear(f"{at}.ffn_out", gelu(linear(f"{at}.ffn_in", x))))
            layer += 1
        found.append(x[0])
    return np.array(found)


@cache
def pretrained_features(model, max_length, texts):
    """phi_0(x), (N, h), of the encoder in the folder `model`."""
    config = json.loads((Path(model) / "config.json").read_text())
    samples, tensors = encode(model, max_length, texts), read_checkpoint(model)
    return features_of(tensors, samples, config["num_attention_heads"], config["layer_norm_eps"], None)


# ---------------------------------------------------------------------------- what is measured


def cross_entropy(logits, labels):
    return float(-np.log(softmax(logits)[np.arange(len(labels)), labels]).mean())


def accuracy(logits, labels):
    return float((logits.argmax(1) == labels).mean())


def matthews(logits, labels):
    """From counts: of right samples, and of each class among predictions and among labels."""
    n, right = len(labels), int((logits.argmax(1) == labels).sum())
    predicted, true = (np.bincount(y, minlength=logits.shape[1]) for y in (logits.argmax(1), labels))
    spread = (n * n - predicted @ predicted) * (n * n - true @ true)
    return float((right * n - predicted @ true) / math.sqrt(spread)) if spread else 0.0


METRICS = {"accuracy": accuracy, "matthews": matthews}


def temperature(logits, labels):
    """The T of the least cross-entropy of logits / T, by halving log T; 1 where there is no such T."""
    of_label = logits[np.arange(len(labels)), labels]  # (N,)
    all_right = (of_label == logits.max(1)).all()  # the less T, the better
    not_better_than_chance = (of_label - logits.mean(1)).mean() <= 0  # the more T, the better
    if all_right or not_better_than_chance:
        return 1.0
    low, high = -20.0, 20.0
    for _ in range(100):
        middle = (low + high) / 2
        expected = (softmax(logits / math.exp(middle)) * logits).sum(1)  # (N,)
        too_sure = (expected - of_label).mean() > 0  # the loss falls as T grows
        low, high = (middle, high) if too_sure else (low, middle)
    return math.exp(low)


def calibration(logits, labels):
    """(ECE, MCE) over 15 bins, each open below and closed above."""
    probabilities = softmax(logits)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    ece, mce = 0.0, 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            ece, mce = ece + gap * inside.mean(), max(mce, gap)
    return float(ece), float(mce)


def feature_statistics(features, features_0, labels):
    lengths = np.linalg.norm(features, axis=1)
    cosines = features @ features.T / np.outer(lengths, lengths)
    between, within, middle = 0.0, 0.0, features.mean(0)
    for c in np.unique(labels):
        of_class = features[labels == c]
        between += len(of_class) * ((of_class.mean(0) - middle)**2).sum()
        within += ((of_class - of_class.mean(0))**2).sum()
    return {"cs": float(cosines[~np.eye(len(features), dtype=bool)].mean()),
            "diff": float(np.linalg.norm(features - features_0, axis=1).mean()),
            "fdr": float(between / within), "norm": float(lengths.mean())}


# ---------------------------------------------------------------------------- a run


class Run:
    """A finished run: what lies in its folder, and from that what its model computes.

    features, logits    {split: array}, of the saved weights; not of train
    features_0          {split: array}, of the pre-trained encoder
    first_head          (V, b) where the FT stage starts; zeros for LP
    """

    def __init__(self, folder, lp_folder=None):
        self.folder = Path(folder)
        self.config, self.result, self.settings = (json.loads((self.folder / f"{name}.json").read_text())
                                                   for name in ("config", "result", "classifier"))
        self.records = read_records(self.folder)
        self.tensors = read_tensors(self.folder / "model.safetensors")
        self.splits, self.names = read_data(self.config)
        self.metric = "matthews" if self.config["data"] == "cola" else "accuracy"
        self.labels = {split: np.array([self.names.index(label) for _, label in rows])
                       for split, rows in self.splits.items()}
        self.test_names = [split for split in self.splits if split not in ("train", "val")]
        self.head = self.tensors["head.weight"], self.tensors["head.bias"]
        self.first_head = self.find_first_head(lp_folder)
        self.features, self.features_0, self.logits = {}, {}, {}
        model, max_length = self.config["model"], self.config["max_length"]
        encoder = json.loads((Path(model) / "config.json").read_text())
        saved = {name.removeprefix("encoder."): tensor for name, tensor in self.tensors.items()}
        scaling = self.config["lora_alpha"] / self.config["lora_r"] if self.config.get("lora") else None
        for split, rows in self.splits.items():
            texts = tuple(text for text, _ in rows)
            samples = encode(model, max_length, texts)
            self.features_0[split] = pretrained_features(model, max_length, texts)
            if split != "train":  # of which LP alone has numbers, and those are of phi_0
                self.features[split] = features_of(saved, samples, encoder["num_attention_heads"],
                                                   encoder["layer_norm_eps"], scaling)
                self.logits[split] = self.features[split] @ self.head[0].T + self.head[1]

    def find_first_head(self, lp_folder):
        weight, bias = (np.zeros_like(part) for part in self.head)
        if self.config["method"] == "lpft":
            lp = read_tensors(Path(lp_folder) / "model.safetensors")
            weight, bias = lp["head.weight"], lp["head.bias"]
        if self.config["method"] == "ft":
            import torch  # for its random numbers

            torch.manual_seed(self.config["seed"])
            drawn = torch.nn.Linear(*reversed(weight.shape)).weight  # as PyTorch draws it, and then anew
            weight = torch.nn.init.normal_(drawn, std=0.02).detach().numpy().astype(np.float64)
        scale = self.config.get("head_scale", 1.0)
        return scale * weight, scale * bias

    def scores(self, logits, split):
        """{accuracy, and matthews where that is the metric} of logits on a split."""
        return {name: METRICS[name](logits[split], self.labels[split]) for name in ("accuracy", self.metric)}

    def numbers(self):
        """All that result.json has to hold, but for LP's and the kernel's part and what the clock says."""
        T = temperature(self.logits["val"], self.labels["val"])
        found = {"samples": {split: len(rows) for split, rows in self.splits.items()}, "temperature": T}
        for name in ("accuracy", self.metric, "calibration", "features", "features_pretrained"):
            found[name] = {}
        found |= {f"val_{name}": score for name, score in self.scores(self.logits, "val").items()}
        for split in self.test_names:
            labels, logits = self.labels[split], self.logits[split]
            for name, score in self.scores(self.logits, split).items():
                found[name][split] = score
            features, features_0 = self.features[split], self.features_0[split]
            found["features"][split] = feature_statistics(features, features_0, labels)
            found["features_pretrained"][split] = feature_statistics(features_0, features_0, labels)
            found["calibration"][split] = dict(zip(("ece", "mce", "ece_scaled", "mce_scaled"), (
                *calibration(logits, labels), *calibration(logits / T, labels))))
        found |= {"head_norm": float(np.linalg.norm(self.head[0])),
                  "head_norm_initial": float(np.linalg.norm(self.first_head[0])),
                  "head_diff": float(np.linalg.norm(self.head[0] - self.first_head[0]))}
        trained = {"lp": ("head.",), "ft": ("",), "lpft": ("",)}[self.config["method"]]
        if self.config.get("lora"):
            trained = ("head.", ".lora_A.", ".lora_B.")
        found["total_parameters"] = sum(tensor.size for tensor in self.tensors.values())
        found["trainable_parameters"] = sum(tensor.size for name, tensor in self.tensors.items()
                                            if any(part in name for part in trained))
        if self.config["method"] != "lp":
            scores = {epoch: record[f"val_{self.metric}"] for epoch, record in self.records.items()
                      if epoch not in ("lp", 0)}
            best = max(scores.values())
            found["kept_epoch"] = min(epoch for epoch, score in scores.items() if score == best)
        return found


def leaves(tree, at=""):
    """{"a.b": value} of nested dicts."""
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{at}{key}.") if isinstance(value, dict) else {f"{at}{key}": value}
    return found


if __name__ == "__main__":
    print(json.dumps(Run(*sys.argv[1:]).numbers(), indent=2))
