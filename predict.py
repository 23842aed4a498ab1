"""Classify new text with a finished run of train.py.

    python predict.py runs/my-run < texts.txt > labels.tsv
    python predict.py runs/my-run pairs.tsv --format jsonl

One text a line, or, if the run was trained on pairs, two with a tab between; in the same order, one line
each with the label and the probability of every class, softmax(logits / T) with the temperature T of
the run. Read, classified and written 10,000 lines at a time: a file of any length takes the same memory.

Exit status: 0 done, 2 bad input (one line says what; lines before it are written), 1 memory or disk full, 130
interrupted.
"""

import json
import os
import sys
from itertools import islice
from pathlib import Path

import plumbing  # noqa: F401  before torch
from tqdm import tqdm

from data import count_unknown, encode
from data.readers import decode_lines
from lpft import predict
from plumbing.devices import choose_device
from plumbing.export import load_classifier
from plumbing.flags import Parser, exit_status, run_main

CHUNK = 10_000  # lines; sorted by length within, so that batches hold little padding


def parse_args(argv=None):
    parser = Parser("predict.py", description="Classify lines of text with a finished run of train.py.",
                    epilog="Example: echo 'the screen was good .' | python predict.py RUN_DIR")
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR", help="the folder that train.py printed")
    add("file", type=Path, nargs="?", metavar="FILE", help="UTF-8, one sample a line; the texts of a pair "
        "with a tab between (default: standard input)")
    add("--format", choices=("tsv", "jsonl"), default="tsv", help="tsv: a header, then label and one "
        "probability per class; jsonl: {label, probabilities} (default: tsv)")
    add("--batch-size", type=int, default=64, metavar="N", help="samples at once (default: 64)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="auto takes cuda, else mps, else cpu (default: auto)")
    args = parser.parse_intermixed_args(argv)  # flags between RUN_DIR and FILE, too
    if args.batch_size < 1:
        parser.error(f"--batch-size is {args.batch_size}; expected 1 or more")
    return args


def read_texts(lines, name, pairs):
    """Yield (text_a, text_b or None, 0) per line; 0 stands for the label that is not known."""
    for number, line in enumerate(decode_lines(lines, name), 1):
        cells = line.rstrip("\r\n").split("\t") if pairs else [line.rstrip("\r\n"), None]
        if len(cells) != 2:
            raise ValueError(f"{name}, line {number}: {len(cells)} texts; this run was trained on pairs: "
                             "expected two with a tab between")
        if any(text is not None and not text.strip() for text in cells):
            raise ValueError(f"{name}, line {number}: an empty text")
        yield *cells, 0


def write_predictions(out, labels, probabilities, form):
    """One line per row of probabilities (N, C)."""
    for row in probabilities.tolist():
        label = labels[row.index(max(row))]
        if form == "jsonl":
            content = {"label": label, "probabilities": {k: round(p, 6) for k, p in zip(labels, row)}}
            print(json.dumps(content, ensure_ascii=False), file=out)
        else:
            print(label, *(f"{p:.6f}" for p in row), sep="\t", file=out)


def run(args):
    model, tokenizer, settings = load_classifier(args.run_dir)
    model.to(choose_device(args.device))
    if settings["data"] in ("wic", "wsc", "pubmed20k"):
        tqdm.write(f"trained on {settings['data']}: give texts as data/corpora.py builds them", sys.stderr)
    if settings["temperature_reason"]:
        tqdm.write(f"predict.py: T is 1, not fitted: {settings['temperature_reason']}", file=sys.stderr)
    if sys.stdout is None or args.file is None and sys.stdin is None:
        raise ValueError("standard input or output is closed")
    if args.file and (not args.file.exists() or args.file.is_dir() or args.file.suffix in (".csv", ".jsonl")):
        what = "is not lines of text" if args.file.exists() else "no such file"
        raise ValueError(f"{args.file}: {what}; expected one sample a line, without header or label")
    lines, name = (open(args.file, "rb"), args.file) if args.file else (sys.stdin.buffer, "standard input")
    rows, labels = read_texts(lines, name, settings["pairs"]), settings["labels"]
    if args.format == "tsv":
        print("\t".join(["label", *labels]))
    failed, unknown, tokens = None, 0, 0
    with tqdm(desc="predicting", unit="line", unit_scale=True) as bar:
        while failed is None:
            chunk = []
            try:
                chunk.extend(islice(rows, CHUNK))  # keeps what came before a bad line
            except ValueError as error:
                failed = error
            if not chunk:
                break
            split = encode(tokenizer, chunk, settings["max_length"])
            _, logits = predict(model, split, args.batch_size)
            probabilities = (logits.double() / settings["temperature"]).softmax(1)  # (N, C)
            write_predictions(sys.stdout, labels, probabilities, args.format)
            sys.stdout.flush()
            bar.update(len(chunk))
            counts = count_unknown(tokenizer, split, settings["pairs"])
            unknown, tokens = unknown + counts[0], tokens + counts[1]
    if unknown:
        share, token = f"{100 * unknown / tokens:.3g} % of the tokens", tokenizer.model.unk_token
        print(f"predict.py: warning: {share} are {token}, words that the tokenizer of this run does not know",
              file=sys.stderr)
    if failed is not None:
        raise failed


def main(argv=None):
    args = parse_args(argv)

    def work():
        try:
            run(args)
        except BrokenPipeError:  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to flush into it

    return exit_status("predict.py", work)


if __name__ == "__main__":
    run_main(main)
