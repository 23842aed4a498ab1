"""Pre-train a tiny encoder on the generated review language. The one in data/tiny_encoder was made by this.

    python -m lab.pretrain                     the language that is shipped, about two minutes on 2 cores
    python -m lab.pretrain --seed 3 --out DIR  another language, with words that are liked and disliked anew

The encoder learns to guess masked words from their context (masked language modelling, BERT), and
to guess the same words from the first token alone. The second task makes the first token, which is
phi(x), carry what the document says. How good or bad a review is appears all at once after some
thousand steps, so a gate checks at the end that a linear probe can read it.

Shapes: N documents, L tokens.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import plumbing  # noqa: F401  before torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import encode, evaluation_batches, tiny
from lpft import accuracy, fit_linear_probe, predict, set_head
from model import Classifier, Encoder, EncoderConfig, init_weights
from plumbing.checkpoint import save_pretrained
from plumbing.flags import Failed, Parser, exit_status, run_main


@dataclass
class Settings:
    """Everything that decides the tiny encoder, apart from the code."""

    seed: int = tiny.LANGUAGE
    documents: int = 40_000
    steps: int = 4000
    batch_size: int = 64
    lr: float = 3e-3
    warmup: float = 0.06  # share of the steps
    weight_decay: float = 0.01
    mask_content: float = 0.3  # share of content words that are masked
    mask_function: float = 0.05
    first_token_weight: float = 0.5
    gate: float = 0.9  # validation accuracy that LP must reach
    threads: int = 2  # another number adds in another order, which after 4000 steps is another encoder


def tiny_config():
    return EncoderConfig(vocab_size=len(tiny.vocabulary()[0]), hidden_size=64, num_hidden_layers=2,
                         num_attention_heads=4, intermediate_size=256, max_position_embeddings=128,
                         type_vocab_size=2, initializer_range=0.05)


class MaskedLanguageModel(nn.Module):
    """An encoder with a head that guesses words, its output matrix tied to the word embeddings."""

    def __init__(self, encoder):
        super().__init__()
        h = encoder.config.hidden_size
        self.encoder = encoder
        self.dense = nn.Linear(h, h)
        self.norm = nn.LayerNorm(h, eps=encoder.config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(encoder.config.vocab_size))
        init_weights(self.dense, encoder.config.initializer_range)

    def predict_words(self, hidden):
        """Hidden states (..., h) to word logits (..., vocabulary)."""
        x = self.norm(F.gelu(self.dense(hidden)))
        return F.linear(x, self.encoder.word_embeddings.weight, self.bias)  # (..., vocabulary)


def pretrain(settings):
    """Train an encoder on the CPU, without dropout; it is saved with dropout for fine-tuning."""
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    tokenizer, config = tiny.make_tokenizer(), tiny_config()
    texts = tiny.Language(settings.seed).documents(settings.documents)
    corpus = encode(tokenizer, [(text, None, 0) for text in texts], config.max_length)
    encoder = Encoder(config).eval()  # without dropout
    language_model = MaskedLanguageModel(encoder)
    optimizer = torch.optim.AdamW(language_model.parameters(), lr=settings.lr, fused=True,
                                  weight_decay=settings.weight_decay)
    warmup = settings.warmup * settings.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warmup, (settings.steps - step) / (settings.steps - warmup)))
    batches = evaluation_batches(corpus.lengths, settings.batch_size)  # like lengths: little padding
    order, threads = [], torch.get_num_threads()
    torch.set_num_threads(settings.threads)  # whatever the machine has
    with tqdm(range(settings.steps), desc="pre-training", unit="step", mininterval=1.0) as bar:
        for _ in bar:
            order = order or rng.sample(range(len(batches)), len(batches))
            loss = pretrain_step(language_model, corpus.batch(batches[order.pop()])[0], settings)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    torch.set_num_threads(threads)
    return encoder


def pretrain_step(language_model, batch, settings):
    """Put the clipped gradient of the loss on a batch into the parameters; returns the loss."""
    masked, chosen = mask_words(batch, settings)  # (N, L), (N, L)
    hidden = language_model.encoder(masked, batch["attention_mask"])  # (N, L, h)
    guesses = language_model.predict_words(hidden[chosen])  # (masked words, vocabulary)
    in_context = F.cross_entropy(guesses, batch["input_ids"][chosen])
    # Every masked word of a document is guessed from one vector, its first hidden state. By
    # gather: indexing with repeated rows has a backward pass that adds in a random order.
    first = language_model.predict_words(hidden[:, 0]).log_softmax(1)  # (N, vocabulary)
    from_first = -first.gather(1, batch["input_ids"])[chosen].mean()
    loss = in_context + settings.first_token_weight * from_first
    language_model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(language_model.parameters(), 1.0)
    return loss.detach()


def mask_words(batch, settings):
    """(ids with [MASK] in some places, True at those places): (N, L), (N, L)."""
    ids, (words, function_words) = batch["input_ids"], tiny.vocabulary()
    rate = torch.full((len(words),), settings.mask_content)  # (vocabulary,)
    rate[:function_words] = settings.mask_function
    rate[:len(tiny.SPECIAL_WORDS)] = 0.0
    chosen = torch.rand(ids.shape) < rate[ids]  # (N, L)
    return ids.masked_fill(chosen, words.index("[MASK]")), chosen


def check_polarity(encoder, tokenizer, settings):
    """The gate: Failed unless LP on `tiny-120` reads polarity from the features."""
    texts = tiny.load("tiny-120", settings.seed)
    train, val = (encode(tokenizer, [(text, None, label) for text, label in texts[name]], 128)
                  for name in ("train", "val"))
    classifier = Classifier(encoder, len(tiny.LABELS))
    set_head(classifier, fit_linear_probe(predict(classifier, train)[0], train.labels, len(tiny.LABELS)))
    reached = accuracy(predict(classifier, val)[1], val.labels)
    if reached < settings.gate:
        raise Failed(
            f"the tiny encoder has not learnt polarity: a linear probe reaches {reached:.3f} on validation, "
            f"the gate is {settings.gate}; nothing was written. Another --seed may pass it")
    print(f"gate passed: a linear probe reads polarity with accuracy {reached:.3f} (needed: {settings.gate})")


def main(argv=None):
    parser = Parser("lab.pretrain", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seed", type=int, default=tiny.LANGUAGE, metavar="N",
        help="of the language and the weights (default: %(default)s, which is shipped)")
    add("--out", type=Path, metavar="DIR", help="a folder for train.py --model (default: tiny-encoder-seedN)")
    args = parser.parse_args(argv)
    out = args.out or Path(f"tiny-encoder-seed{args.seed}")
    own = "model.safetensors", "tokenizer.json", "tokenizer_config.json"  # of a killed save
    if out.is_file() or out.is_dir() and any(p.name not in own and p.suffix != ".tmp" for p in out.iterdir()):
        parser.error(f"--out {out}: holds something already; expected a new or empty folder")

    def work():
        settings, tokenizer = Settings(seed=args.seed), tiny.make_tokenizer()
        encoder = pretrain(settings)
        check_polarity(encoder, tokenizer, settings)
        save_pretrained(out, encoder, tokenizer, language=args.seed)  # train.py compares
        print(f"the encoder is in {out}; use it with: python train.py --model {out} --language {args.seed}")

    return exit_status("lab.pretrain", work, lambda: "; nothing was written")


if __name__ == "__main__":
    run_main(main)
