"""Pre-train the tiny encoder on the generated review language, once; then it is read from a cache.

    python -m lab.pretrain           what `train.py --model tiny` does on first use, alone

The encoder learns to guess masked words from their context (masked language modelling, BERT), and
to guess the same words from the first token alone. The second task makes the first token, which is
phi(x), carry what the document says. How good or bad a review is appears all at once after some
thousand steps, so a gate checks at the end that a linear probe can read it.

Shapes: N documents, L tokens.
"""

import argparse
import hashlib
import inspect
import json
import os
import random
import shutil
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in train.py

import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import model as model_file
from data import Split, encode, evaluation_batches, tiny
from lpft import accuracy, fit_linear_probe, predict
from model import Classifier, Encoder, EncoderConfig, init_weights
from plumbing.checkpoint import save_pretrained
from plumbing.run_folder import StateFile, random_state, set_random_state, status_of, take_lock, unbroken

CACHE = Path.home() / ".cache" / "lpft"


class PolarityNotLearnt(RuntimeError):
    """The tiny encoder failed its gate; using it would make every result meaningless."""


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


@dataclass
class Settings:
    """Everything that decides the tiny encoder, apart from the code."""

    seed: int = 0
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


def tiny_encoder(settings=None, cache=CACHE):
    """The folder of the pre-trained tiny encoder, for model.load_pretrained; trains it if need be."""
    settings = settings or Settings()
    folder = Path(cache) / f"tiny-{cache_key(settings)}"
    if (folder / "config.json").is_file():
        print(f"tiny encoder: cached in {folder}")
        return folder
    print(f"tiny encoder: not in the cache, pre-training it once, into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)  # before the work: it may fail
    lock = take_lock(folder.with_name(folder.name + ".lock"), wait=True)
    try:
        if not (folder / "config.json").is_file():  # else the process that had the lock has made it
            partial = folder.with_name(folder.name + ".partial")
            partial.mkdir(exist_ok=True)
            encoder, tokenizer = pretrain(settings, StateFile.of(partial / "state", every=10)), tiny.make_tokenizer()
            try:
                check_polarity(encoder, tokenizer, settings)
                shutil.rmtree(folder, ignore_errors=True)
                save_pretrained(partial / "done", encoder, tokenizer)
                (partial / "done").rename(folder)
            except PolarityNotLearnt:
                (partial / "state").unlink(missing_ok=True)  # it would fail again
                raise
            finally:
                if not (partial / "state").exists() or (folder / "config.json").is_file():
                    shutil.rmtree(partial, ignore_errors=True)
    finally:
        lock.release()
    return folder


def cache_key(settings):
    """A hash of all that determines the encoder: settings, sizes, PyTorch, and the code that runs."""
    code = [inspect.getsource(thing) for thing in (
        tiny, model_file.SelfAttention, model_file.Layer, Encoder, MaskedLanguageModel,
        model_file.init_weights, encode, Split, evaluation_batches, mask_words, pretrain_step, pretrain)]
    parts = [asdict(settings), asdict(tiny_config()), torch.__version__, tokenizers.__version__, code]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def pretrain(settings, state=None):
    """Train an encoder on the CPU, without dropout; it is saved with dropout for fine-tuning.

    Goes on from a resume.StateFile, if that holds progress.
    """
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    tokenizer, config = tiny.make_tokenizer(), tiny_config()
    texts = tiny.Language(settings.seed).documents(settings.documents)
    corpus = encode(tokenizer, [(text, None, 0) for text in texts], config.max_length)
    encoder = Encoder(replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    language_model = MaskedLanguageModel(encoder)
    optimizer = torch.optim.AdamW(language_model.parameters(), lr=settings.lr, fused=True,
                                  weight_decay=settings.weight_decay)
    warmup = settings.warmup * settings.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warmup, (settings.steps - step) / (settings.steps - warmup)))
    batches = evaluation_batches(corpus.lengths, settings.batch_size)  # like lengths: little padding
    order, done, threads = [], 0, torch.get_num_threads()
    torch.set_num_threads(settings.threads)  # whatever the machine has
    if state and state.parts:
        language_model.load_state_dict(state.parts["weights"])
        optimizer.load_state_dict(state.parts["optimizer"])
        schedule.load_state_dict(state.parts["schedule"])
        set_random_state(state.parts["random"])
        rng.setstate(state.parts["rng"])
        order, done = state.parts["order"], state.parts["step"]

    def save(step):
        state.save(weights=language_model.state_dict(), optimizer=optimizer.state_dict(), rng=rng.getstate(),
                   schedule=schedule.state_dict(), random=random_state(torch.device("cpu")), order=order, step=step)

    try:
        with tqdm(total=settings.steps, initial=done, desc="pre-training", unit="step", mininterval=1.0) as bar:
            while done < settings.steps:
                with unbroken():  # Ctrl-C never leaves half a step
                    if not order:
                        order = rng.sample(range(len(batches)), len(batches))
                    loss = pretrain_step(language_model, corpus.batch(batches[order.pop()])[0], settings)
                    optimizer.step()
                    schedule.step()
                    done += 1
                if bar.update():
                    bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                if state and state.due():
                    save(done)
    except KeyboardInterrupt:
        if state:
            save(done)
        raise
    finally:
        torch.set_num_threads(threads)
    encoder.config = config
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = config.hidden_dropout_prob
        if isinstance(module, model_file.SelfAttention):
            module.dropout = config.attention_probs_dropout_prob
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
    """The gate: raise PolarityNotLearnt unless LP on `tiny-plain` reads polarity from the features."""
    texts = tiny.load("tiny-plain", settings.seed)
    train, val = (encode(tokenizer, [(text, None, label) for text, label in texts[name]], 128)
                  for name in ("train", "val"))
    classifier = Classifier(encoder, len(tiny.LABELS))
    probe = fit_linear_probe(predict(classifier, train)[0], train.labels, len(tiny.LABELS))
    logits = predict(classifier, val)[0].double() @ probe.weight.T + probe.bias
    reached = accuracy(logits, val.labels)
    if reached < settings.gate:
        raise PolarityNotLearnt(
            f"the tiny encoder has not learnt polarity: a linear probe reaches {reached:.3f} on "
            f"validation, the gate is {settings.gate}; nothing was cached. More steps or another "
            "seed in pretrain.Settings may pass it")
    print(f"tiny encoder: gate passed, a linear probe reads polarity with accuracy {reached:.3f} "
          f"(needed: {settings.gate})")


def main(argv=None):
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    try:
        tiny_encoder()
        return 0
    except PolarityNotLearnt as error:
        print(f"lab.pretrain: error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"lab.pretrain: error: {error}", file=sys.stderr)
        return status_of(error)
    except KeyboardInterrupt:
        print("\npretrain.py: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's way to say Ctrl-C
    sys.exit(main())
