"""The encoder against transformers, LoRA against peft, and the properties both must have."""

import random
from itertools import islice

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from conftest import find_data
from data import encode, tiny
from data.corpora import corpus_sources
from model import Classifier, Encoder, EncoderConfig, LoRALinear, add_lora, count_parameters, merge_lora
from plumbing.checkpoint import load_pretrained, save_pretrained

SENTENCES = ["The cat sat on the mat.", "It rained!", "Was the plot any good? Not really, I think.",
             "naïve café 東京 🙂 — odd\tcharacters", "a " * 300]
PAIRS = [(a, b) for a, b in zip(SENTENCES, SENTENCES[::-1])]


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A random RoBERTa written by transformers, with a byte-level BPE tokenizer trained here."""
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


@pytest.mark.parametrize("name", ["minilm", "roberta"])
@pytest.mark.parametrize("rows", [[(s, None, 0) for s in SENTENCES], [(a, b, 0) for a, b in PAIRS]],
                         ids=["single", "pairs"])
def test_hidden_states_equal_those_of_transformers(name, rows, request):
    """In float32 on every token, in float64 on padding too.

    On long padding float32 rounds too coarsely to compare two codes: either is as far from its own
    float64 result as they are from each other.
    """
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


def real_sentences():
    """800 sentences of real corpora, where there are any."""
    rows = []
    for name, count in (("mrpc", 250), ("cola", 150), ("sst2", 100), ("amazon", 100), ("boolq", 100), ("wic", 100)):
        if place := find_data(name):
            rows += islice(corpus_sources(name, place)["train"](), count)
    return [text_b or text_a for _, text_a, text_b, _ in rows if text_a is not None]


def odd_sentences(count=200):
    """Emoji and their joiners, accents composed and not, CJK, right to left, control characters, spaces."""
    rng = random.Random(0)
    pieces = ["🙂", "👩‍👩‍👧", "🇯🇵", "é", "e\u0301", "Å", "ß", "ﬁ", "東京", "한국어", "ไทย", "שלום", "مرحبا", "\x00", "\x07",
              "\u200b", "\ufeff", "\u00ad", "\ufffd", "\u2028", "\x85", "\t", "\r", "\xa0", "\u3000", " ", "  ", "don't",
              "C++", "<s>", "[SEP]", "[unused1]", "</s>", "...", "—", "word", "Word", "WORDS", "x" * 120, "𝔘𝔫𝔦", "½", "№"]
    return ["".join(rng.choices(pieces, k=rng.randrange(1, 30))) + "a" for _ in range(count)]


@pytest.mark.parametrize("name", ["minilm", "roberta"])
@pytest.mark.parametrize("max_length", [48, 128])
def test_token_ids_of_a_thousand_sentences_equal_those_of_transformers(name, max_length, request):
    """Singles and pairs. Truncation takes from the longer text of a pair first, and keeps special tokens."""
    folder = request.getfixturevalue(name)
    _, tokenizer = load_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = SENTENCES + odd_sentences() + real_sentences()
    rows = [(a, None) for a in sentences] + list(zip(sentences, sentences[7:]))
    split = encode(tokenizer, [(a, b, 0) for a, b in rows], max_length)
    longest = 0
    for ours, (a, b) in zip(split, rows, strict=True):
        expected = theirs(a, b, truncation="longest_first", max_length=max_length)
        assert ours["input_ids"] == expected["input_ids"], (a, b)
        assert ours["token_type_ids"] == expected.get("token_type_ids", [0] * len(ours["input_ids"])), (a, b)
        longest = max(longest, len(ours["input_ids"]))
    assert longest == max_length  # some were cut


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("variant", ["bare", "masked-lm", "sharded", "float16", "sentence-transformers"])
def test_checkpoints_as_others_save_them_load_alike(kind, variant, tmp_path):
    """Written by transformers, read here, same hidden states; of float16 files, those of the rounded weights."""
    bert = kind == "bert"
    sizes = {"vocab_size": 282, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 96, "max_position_embeddings": 40, "initializer_range": 0.2,
             "type_vocab_size": 2 if bert else 1, "pad_token_id": 0 if bert else 1}
    config = (transformers.BertConfig if bert else transformers.RobertaConfig)(**sizes)
    names = {True: ("BertModel", "BertForMaskedLM"), False: ("RobertaModel", "RobertaForMaskedLM")}[bert]
    torch.manual_seed(0)
    model = getattr(transformers, names[variant == "masked-lm"])(config)
    folder = tmp_path / "0_Transformer" if variant == "sentence-transformers" else tmp_path
    model = model.half() if variant == "float16" else model
    model.save_pretrained(folder, max_shard_size="50KB" if variant == "sharded" else "5GB")
    tiny.make_tokenizer().save(str(folder / "tokenizer.json"))
    if variant == "sentence-transformers":
        (tmp_path / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "0_Transformer", "type": "x"}]')
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert (len(files) > 2) == (variant == "sharded")
    ours, _ = load_pretrained(tmp_path)
    theirs = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(5, 282, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.tensor([[12], [7], [3]])).long()
    ids = torch.where(mask == 1, ids, config.pad_token_id)
    with torch.no_grad():
        found = ours.eval()(ids, mask, torch.zeros_like(ids))
        expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    assert ((found - expected) * mask.unsqueeze(2)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["DistilBert", "Albert", "Deberta", "Electra", "MPNet"])
def test_an_architecture_that_is_not_supported_is_refused_by_name(kind, tmp_path):
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model_type is '{kind.lower()}'; supported: bert, roberta"):
        load_pretrained(tmp_path)


def test_features_do_not_depend_on_padding(minilm):
    """A sentence alone and in a batch with a longer one has the same phi(x): padding is masked."""
    encoder, tokenizer = load_pretrained(minilm)
    model = Classifier(encoder, 2).eval()
    split = encode(tokenizer, [(s, None, 0) for s in SENTENCES], 128)
    together = model.features(**split.batch(range(len(SENTENCES)))[0])
    for i in range(len(SENTENCES)):
        alone = model.features(**split.batch([i])[0])
        assert (alone[0] - together[i]).abs().max() < 1e-5


def test_features_are_the_first_hidden_state_of_the_full_encoder(encoder, batch):
    """first_token_only leaves work out of the last layer and changes no number."""
    features = Classifier(encoder, 3).double().eval().features(**batch)
    assert torch.allclose(features, encoder(**batch)[:, 0], rtol=0, atol=1e-12)


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


def test_lora_with_copied_weights_equals_peft(minilm):
    """peft's adapter on query and value: same outputs, same number of trained parameters.

    In float64: on padding float32 rounds too coarsely to compare two codes.
    """
    torch.manual_seed(0)
    encoder, tokenizer = load_pretrained(minilm)
    theirs = get_peft_model(
        transformers.AutoModel.from_pretrained(minilm),
        LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], lora_dropout=0.0)).eval()
    add_lora(encoder, r=8, lora_alpha=16)
    randomize_lora(encoder)
    for i, layer in enumerate(encoder.layers):
        for projection in ("query", "value"):
            ours = getattr(layer.attention, projection)
            their = getattr(theirs.base_model.model.encoder.layer[i].attention.self, projection)
            their.lora_A["default"].weight.data.copy_(ours.lora_A.weight)
            their.lora_B["default"].weight.data.copy_(ours.lora_B.weight)
    batch, _ = encode(tokenizer, [(s, None, 0) for s in SENTENCES], 64).batch(range(5))
    with torch.no_grad():
        difference = encoder.double().eval()(**batch) - theirs.double()(**batch).last_hidden_state
    assert difference.abs().max() < 1e-9
    assert count_parameters(encoder)[0] == theirs.get_nb_trainable_parameters()[0]


def test_lora_cannot_be_added_twice(encoder):
    add_lora(encoder, r=4, lora_alpha=12)
    with pytest.raises(ValueError, match="merge_lora"):
        add_lora(encoder, r=4, lora_alpha=12)


def test_merging_needs_lora_and_may_follow_training(encoder):
    with pytest.raises(ValueError, match="no LoRA to merge"):
        merge_lora(encoder)
    add_lora(encoder, r=4, lora_alpha=12)
    randomize_lora(encoder)
    layer = encoder.layers[0].attention.query
    assert torch.equal(layer.merged().weight, layer.merged().weight)  # twice adds B A once


# ------------------------------------------------------------------------------------ checkpoints


def test_what_is_saved_is_what_is_loaded(encoder, batch, tmp_path, random_folder):
    _, tokenizer = load_pretrained(random_folder)
    save_pretrained(tmp_path, encoder.float(), tokenizer)
    loaded, same_tokenizer = load_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(**batch), encoder(**batch))
    assert same_tokenizer.to_str() == tokenizer.to_str()


def test_a_saved_encoder_opens_in_transformers(random_folder, batch):
    ours, _ = load_pretrained(random_folder)
    theirs = transformers.AutoModel.from_pretrained(random_folder).eval()
    with torch.no_grad():
        difference = ours.eval()(**batch) - theirs(**batch).last_hidden_state
    assert difference.abs().max() < 2e-5


def test_old_names_and_pickled_tensors_load_alike(minilm, tmp_path):
    """pytorch_model.bin of the first releases: `bert.` in front, gamma and beta in LayerNorm."""
    encoder, _ = load_pretrained(minilm)
    state = transformers.AutoModel.from_pretrained(minilm).state_dict()
    old = {"bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma")
           .replace("LayerNorm.bias", "LayerNorm.beta"): t for name, t in state.items()}
    torch.save(old | {"cls.predictions.bias": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((minilm / name).read_bytes())
    loaded, _ = load_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), encoder.parameters()))


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("encoder.layer.1.output.dense.bias"), "encoder.layer.1.output.dense.bias.*missing"),
    (lambda s: s.update({"encoder.layer.2.output.dense.bias": torch.zeros(64)}), "layer.2.*no place"),
    (lambda s: s.update({"embeddings.LayerNorm.bias": torch.zeros(7)}), r"embeddings.LayerNorm.*\(7,\)"),
])
def test_a_tensor_missing_left_over_or_misshapen_is_named(random_folder, tmp_path, change, message):
    from plumbing.checkpoint import read_safetensors, write_safetensors
    state = read_safetensors(random_folder / "model.safetensors")
    change(state)
    write_safetensors(tmp_path / "model.safetensors", state)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((random_folder / name).read_bytes())
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("change, message", [
    ('"model_type": "bert"', '"model_type": "gpt2"', ),
    ('"hidden_act": "gelu"', '"hidden_act": "relu"'),
    ('"position_embedding_type": "absolute"', '"position_embedding_type": "relative_key"'),
    ('"hidden_size": 64', '"hidden_size": "wide"'),
    ('"hidden_size": 64,', ''),
    ('"hidden_size": 64', '"hidden_size": 64.0'),
    ('"num_attention_heads": 4', '"num_attention_heads": 0'),
    ('"pad_token_id": 0', '"pad_token_id": 9999'),
    ('"hidden_dropout_prob": 0.1', '"hidden_dropout_prob": 1.5'),
    ('{', '['),
])
def test_a_config_this_encoder_cannot_follow_is_refused(random_folder, tmp_path, change, message):
    for file in random_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (tmp_path / "config.json").read_text()
    assert change in text
    (tmp_path / "config.json").write_text(text.replace(change, message))
    with pytest.raises(ValueError, match="config.json"):
        load_pretrained(tmp_path)
