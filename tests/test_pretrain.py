"""Pre-training of the tiny encoder, its gate and its cache; the whole of it is a slow test."""

import pytest
import torch

from lab import pretrain
from data import encode, tiny
from plumbing.checkpoint import load_pretrained

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


def test_an_encoder_that_has_not_learnt_polarity_fails_loudly_and_is_not_cached(tmp_path):
    settings = pretrain.Settings(documents=200, steps=10)
    with pytest.raises(pretrain.PolarityNotLearnt, match="has not learnt polarity"):
        pretrain.tiny_encoder(settings, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_the_encoder_is_trained_once_and_then_read_from_the_cache(tmp_path, monkeypatch):
    folder = pretrain.tiny_encoder(FEW, tmp_path)
    first, _ = load_pretrained(folder)
    assert first.config.hidden_dropout_prob == 0.1  # pre-trained without dropout, fine-tuned with it
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert pretrain.tiny_encoder(FEW, tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_the_same_seed_pre_trains_the_same_encoder_whatever_the_number_of_threads():
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found.append(pretrain.pretrain(FEW))
            assert torch.get_num_threads() == threads  # what follows has its own again
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0].parameters(), other.parameters()))


def test_the_cache_key_follows_the_settings_and_the_code(monkeypatch):
    key = pretrain.cache_key(FEW)
    assert pretrain.cache_key(pretrain.Settings(documents=200, steps=11, gate=0.0)) != key
    monkeypatch.setattr(pretrain, "mask_words", lambda batch, settings: None)
    assert pretrain.cache_key(FEW) != key


@pytest.mark.slow
def test_the_default_settings_pass_the_gate(tmp_path):
    """About two minutes on two cores."""
    assert (pretrain.tiny_encoder(cache=tmp_path) / "model.safetensors").is_file()
