"""The encoder against transformers, LoRA, and the properties both must have."""

import pytest
import torch

from conftest import SENTENCES
from data import encode
from model import Classifier, Encoder, EncoderConfig, LoRALinear, add_lora, count_parameters, merge_lora
from plumbing.checkpoint import load_pretrained

PAIRS = list(zip(SENTENCES, SENTENCES[::-1]))


@pytest.mark.parametrize("name", ["minilm", "roberta"])
@pytest.mark.parametrize("rows", [[(s, None, 0) for s in SENTENCES], [(a, b, 0) for a, b in PAIRS]],
                         ids=["single", "pairs"])
def test_hidden_states_equal_those_of_transformers(name, rows, request):
    """In float32 on every token, in float64 on padding too.

    On long padding float32 rounds too coarsely to compare two codes: either is as far from its own
    float64 result as they are from each other.
    """
    transformers = pytest.importorskip("transformers")
    folder = request.getfixturevalue(name)
    ours, tokenizer = load_pretrained(folder)
    theirs = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    batch, _ = encode(tokenizer, rows, 128).batch(range(len(rows)))
    on_tokens = batch["attention_mask"].unsqueeze(2)
    with torch.no_grad():
        difference = ours.eval()(**batch) - theirs(**batch).last_hidden_state
        assert (difference * on_tokens).abs().max() < 2e-5
        difference = ours.double()(**batch) - theirs.double()(**batch).last_hidden_state
        assert difference.abs().max() < 1e-9


def test_features_do_not_depend_on_padding(minilm):
    """A sentence alone and in a batch with a longer one has the same phi(x): padding is masked."""
    encoder, tokenizer = load_pretrained(minilm)
    model = Classifier(encoder, 2).eval()
    split = encode(tokenizer, [(s, None, 0) for s in SENTENCES], 128)
    together = model.features(**split.batch(range(len(SENTENCES)))[0])
    for i in range(len(SENTENCES)):
        alone = model.features(**split.batch([i])[0])
        assert (alone[0] - together[i]).abs().max() < 1e-5


@pytest.mark.parametrize("pooling", ["auto", "first"])
def test_features_of_minilm_are_pooled_as_its_folder_says(minilm, pooling):
    """auto: 1_Pooling/config.json says the mean over tokens, padding left out; here taken by hand."""
    transformers = pytest.importorskip("transformers")
    encoder, tokenizer = load_pretrained(minilm, pooling)
    batch, _ = encode(tokenizer, [(s, None, 0) for s in SENTENCES], 128).batch(range(len(SENTENCES)))
    with torch.no_grad():
        found = Classifier(encoder, 2).eval().features(**batch)
        hidden = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()(**batch)[0]
    rows = [h[mask.bool()] for h, mask in zip(hidden, batch["attention_mask"])]  # (tokens, h) of each sentence
    expected = torch.stack([h.mean(0) if pooling == "auto" else h[0] for h in rows])
    assert (found - expected).abs().max() < 1e-5


def test_features_are_the_first_hidden_state_of_the_full_encoder(encoder, batch):
    """first_token_only leaves work out of the last layer and changes no number."""
    features = Classifier(encoder, 3).double().eval().features(**batch)
    assert torch.allclose(features, encoder(**batch)[:, 0], rtol=0, atol=1e-12)


def test_without_token_types_all_are_of_the_first(encoder, batch):
    batch = {name: tensor for name, tensor in batch.items() if name != "token_type_ids"}
    zeros = torch.zeros_like(batch["input_ids"])
    assert torch.equal(encoder(**batch), encoder(**batch, token_type_ids=zeros))
    assert not torch.equal(encoder(**batch), encoder(**batch, token_type_ids=zeros + 1))


def test_the_longest_input_has_a_position_for_every_token():
    """RoBERTa numbers tokens from pad_token_id + 1: 514 rows of positions are for 512 tokens."""
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 1}
    for kind, positions, longest in (("bert", 20, 20), ("roberta", 20, 18)):
        config = EncoderConfig(**sizes, max_position_embeddings=positions, pad_token_id=int(kind == "roberta"),
                               model_type=kind)
        encoder, ids = Encoder(config), torch.full((1, longest), 5)
        assert config.max_length == longest and encoder(ids, torch.ones_like(ids)).shape == (1, longest, 8)
        with pytest.raises(IndexError):
            encoder(torch.full((1, longest + 1), 5), torch.ones(1, longest + 1, dtype=torch.long))


def test_features_do_not_depend_on_what_trains(encoder, batch):
    """Bitwise: LP reports a feature change of exactly 0."""
    model = Classifier(encoder.float(), 3).eval()
    with torch.no_grad():
        training = model.features(**batch)
        encoder.requires_grad_(False)
        assert torch.equal(model.features(**batch), training)


def test_an_encoder_starts_as_bert_does():
    """Weights of standard deviation 0.02, biases zero, and nothing for the padding token."""
    config = EncoderConfig(vocab_size=500, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
                           intermediate_size=128, max_position_embeddings=32, pad_token_id=3)
    encoder = Encoder(config)
    for name, p in encoder.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            assert 0.017 < float(p.detach().std()) < 0.023, name
    assert not encoder.word_embeddings.weight[3].any() and encoder.word_embeddings.weight[2].any()


def test_every_head_of_attention_gets_the_same_width():
    with pytest.raises(ValueError, match="hidden_size 64 is not a multiple of num_attention_heads 5"):
        Encoder(EncoderConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1, num_attention_heads=5,
                              intermediate_size=8, max_position_embeddings=8))


def test_classifier_starts_with_a_small_head_without_bias(encoder):
    head = Classifier(encoder, 500).head
    assert abs(float(head.weight.detach().std()) - 0.02) < 0.001
    assert torch.equal(head.bias, torch.zeros(500))


def test_dropout_acts_in_training_and_not_in_evaluation(encoder, batch):
    model = Classifier(encoder, 3).double()
    assert torch.equal(model.eval()(**batch), model(**batch))
    assert not torch.equal(model.train()(**batch), model(**batch))


# ------------------------------------------------------------------------------------ LoRA


def randomize_lora(encoder):
    for module in encoder.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B.weight, std=0.1)


def test_lora_starts_as_the_identity_bitwise(encoder, batch):
    before = encoder(**batch)
    add_lora(encoder, r=4, lora_alpha=12)
    assert torch.equal(encoder(**batch), before)


def test_merged_lora_computes_what_unmerged_lora_computes(encoder, batch):
    """W_0 + (lora_alpha / r) B A in one matrix, or as a sum of two paths."""
    add_lora(encoder, r=4, lora_alpha=10)
    randomize_lora(encoder)
    unmerged = encoder(**batch)
    merge_lora(encoder)
    assert not any(isinstance(module, LoRALinear) for module in encoder.modules())
    assert (encoder(**batch) - unmerged).abs().max() < 1e-10


def test_lora_trains_its_matrices_and_the_head_and_nothing_else(encoder):
    model = Classifier(encoder, 3)
    add_lora(encoder, r=4, lora_alpha=12)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {f"encoder.layers.{i}.attention.{projection}.lora_{matrix}.weight"
                for i in range(2) for projection in ("query", "value") for matrix in "AB"}
    assert trained == expected | {"head.weight", "head.bias"}
    assert count_parameters(model)[0] == 2 * 2 * (4 * 64 + 64 * 4) + 3 * 64 + 3


def test_lora_cannot_be_added_twice(encoder):
    add_lora(encoder, r=4, lora_alpha=12)
    with pytest.raises(ValueError, match="merge_lora"):
        add_lora(encoder, r=4, lora_alpha=12)


def test_the_smallest_rank_is_one(encoder):
    with pytest.raises(ValueError, match="r is 0; expected 1 or more"):
        add_lora(encoder, r=0)
    add_lora(encoder, r=1)
    assert encoder.layers[0].attention.query.lora_A.out_features == 1


def test_merging_leaves_w_0_as_it_is(encoder):
    """merged() is a new layer: the LoRALinear can be trained on, or merged again, to the same weights."""
    add_lora(encoder, r=4, lora_alpha=12)
    randomize_lora(encoder)
    layer = encoder.layers[0].attention.query
    before, merged = layer.linear.weight.clone(), layer.merged()
    assert torch.equal(layer.linear.weight, before) and not torch.equal(merged.weight, before)
    assert torch.equal(layer.merged().weight, merged.weight) and torch.equal(merged.bias, layer.linear.bias)


def test_lora_is_added_in_the_mode_that_the_layer_is_in(encoder):
    for training in (True, False):
        layer = LoRALinear(encoder.layers[0].attention.query.train(training), 2, 2)
        assert layer.training is training and layer.lora_A.training is training


def test_merging_needs_lora_and_may_follow_training(encoder):
    with pytest.raises(ValueError, match="no LoRA to merge"):
        merge_lora(encoder)
    add_lora(encoder, r=4, lora_alpha=12)
    randomize_lora(encoder)
    layer = encoder.layers[0].attention.query
    assert torch.equal(layer.merged().weight, layer.merged().weight)  # twice adds B A once
