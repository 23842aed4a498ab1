"""Pre-training of the tiny encoder, its gate and the weights that are shipped; the whole of it is a slow test."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lab import pretrain
from lab.runs import METHODS
from data import encode, tiny
from plumbing.checkpoint import load_pretrained

ROOT = Path(__file__).resolve().parents[1]
FEW = pretrain.Settings(documents=200, steps=10, gate=0.0)


def test_masking_takes_content_words_far_more_often_than_function_words():
    words, function_words = tiny.vocabulary()
    texts = tiny.Language().documents(400)
    batch, _ = encode(tiny.make_tokenizer(), [(t, None, 0) for t in texts], 128).batch(range(400))
    torch.manual_seed(0)
    masked, chosen = pretrain.mask_words(batch, pretrain.Settings())
    ids = batch["input_ids"]
    special, content = ids < len(tiny.SPECIAL_WORDS), ids >= function_words
    assert not chosen[special].any()
    assert abs(float(chosen[content].float().mean()) - 0.30) < 0.02
    assert abs(float(chosen[~content & ~special].float().mean()) - 0.05) < 0.01
    assert torch.equal(masked == words.index("[MASK]"), chosen)
    assert torch.equal(masked[~chosen], ids[~chosen])


def test_an_encoder_that_has_not_learnt_polarity_fails_loudly_and_is_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "Settings", lambda seed: replace(FEW, seed=seed, gate=0.9))
    assert pretrain.main(["--out", str(tmp_path / "encoder")]) == 1
    assert "has not learnt polarity" in capsys.readouterr().err and not (tmp_path / "encoder").exists()


def test_the_encoder_that_is_shipped_passes_the_gate_and_a_random_one_does_not(random_folder):
    pretrain.check_polarity(*load_pretrained(tiny.ENCODER), pretrain.Settings())
    with pytest.raises(pretrain.Failed):
        pretrain.check_polarity(*load_pretrained(random_folder), pretrain.Settings())


def test_another_seed_is_another_language_in_a_folder_that_train_py_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "Settings", lambda seed: replace(FEW, seed=seed))
    for seed in ("1", "2"):
        assert pretrain.main(["--seed", seed, "--out", str(tmp_path / seed)]) == 0
    first, second = (load_pretrained(tmp_path / seed)[0] for seed in ("1", "2"))
    assert first.config.hidden_dropout_prob == 0.1  # pre-trained without dropout, fine-tuned with it
    assert not torch.equal(first.word_embeddings.weight, second.word_embeddings.weight)
    with pytest.raises(SystemExit):  # a folder that holds something
        pretrain.main(["--out", str(tmp_path / "1")])
    (tmp_path / "2" / "config.json").rename(tmp_path / "2" / "config.json.tmp")  # as a kill during the save leaves it
    assert pretrain.main(["--seed", "2", "--out", str(tmp_path / "2")]) == 0
    (tmp_path / "2" / "config.json").unlink()
    (tmp_path / "2" / "notes.txt").touch()
    with pytest.raises(SystemExit):
        pretrain.main(["--seed", "2", "--out", str(tmp_path / "2")])


def test_the_same_seed_pre_trains_the_same_encoder_whatever_the_number_of_threads():
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found.append(pretrain.pretrain(FEW))
            assert torch.get_num_threads() == threads  # what follows has its own again
    finally:
        torch.set_num_threads(before)
    assert not found[0].training  # a few thousand masked words are learnt without dropout
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0].parameters(), other.parameters()))


def test_the_shipped_language_is_the_nearest_of_fifty_to_their_mean():
    """By accuracy out of distribution, of all five methods together, in the committed tables."""
    tables = json.loads((ROOT / "lab/results/tiny/tables.json").read_text())["tables"]["Accuracy (Tables 8, 10, 16)"]
    of_methods = [np.mean([tables[domain][method]["values"] for domain in tiny.DOMAINS[1:]], 0) for method in METHODS]
    distance = sum((accuracy - accuracy.mean())**2 for accuracy in of_methods)  # (languages,)
    assert len(distance) == 50 and distance.argmin() == tiny.LANGUAGE
    assert json.loads((tiny.ENCODER / "config.json").read_text())["language"] == tiny.LANGUAGE


@pytest.mark.slow
def test_the_shipped_weights_are_those_that_the_command_makes(tmp_path):
    """About two minutes on two cores. Another CPU rounds differently, and after 4000 steps that is another encoder."""
    assert pretrain.main(["--out", str(tmp_path / "encoder")]) == 0
    made, shipped = (load_pretrained(folder)[0].state_dict() for folder in (tmp_path / "encoder", tiny.ENCODER))
    assert all(torch.equal(made[name], shipped[name]) for name in shipped)
