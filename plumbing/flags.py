"""The command line: refusals in one line, defaults by task, flags of a resumed run, exit statuses."""

import argparse
import errno
import os
import re
import signal
import sys
from pathlib import Path

import torch

from data import count_unknown, draw_ntk_samples, tiny
from data.corpora import CORPORA, RECIPES
from plumbing.devices import describe
from plumbing.files import read_json

STAGES = ("ft", False), ("ft", True), ("lpft", False), ("lpft", True)  # (method, LoRA), columns of RECIPES


class Parser(argparse.ArgumentParser):
    """A wrong flag is one line and status 2; flags are not abbreviated."""

    def __init__(self, program, **how):
        super().__init__(program, allow_abbrev=False, **how)

    def error(self, message):
        more = "; --help lists the flags" * message.startswith("unrecognized")
        self.exit(2, f"{self.prog}: error: {message}{more}\n")


class Failed(Exception):
    """The work came to its end, but not to its goal: status 1."""


def exit_status(program, work, go_on=lambda: ""):
    """Call work(). 0; or one line on standard error, and 2 for bad input, 130 if interrupted, 1 for a full
    disk or memory, a solver that did not converge, an open assignment and Failed."""
    try:
        work()
        return 0
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted{go_on()}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError, NotImplementedError, Failed) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        broken = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EPIPE  # disk, pipe
        bad_input = isinstance(error, (ValueError, OSError)) and getattr(error, "errno", None) not in broken
        return 2 if bad_input else 1
    except (MemoryError, RuntimeError) as error:  # PyTorch's are RuntimeErrors, of a GPU or of a CPU
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        lower = {"train.py": "; lower --max-length, --max-train, --ntk or --batch-size",
                 "predict.py": "; lower --batch-size"}.get(program, "")
        print(f"{program}: error: out of memory{lower}", file=sys.stderr)
        return 1


def run_main(main):
    """A command's process: it ends with main's exit status, and SIGTERM, as clusters send it, is Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())


# ---------------------------------------------------------------------------- train.py's flags


def read(parser, argv=None):
    """train.py's flags, checked, with defaults filled in; those of the run itself if --resume names one."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if not args.resume:
        check(parser, args)
        return fill_defaults(args)
    if len(argv) > 2 or sum(word.startswith("--") for word in argv) > 1:
        parser.error(f"--resume takes the flags in {args.resume / 'config.json'}; expected no other flag")
    path = args.resume / "config.json"
    try:
        if not path.is_file():
            raise ValueError(f"--resume {path.parent}: holds no config.json; expected a run's folder")
        config = read_json(path)
        threads, known = config.pop("threads", None), vars(parser.parse_args([])).keys() - {"resume"}
        unknown = config.keys() - known - {"versions"}
        if unknown or type(threads) is not int or not 1 <= threads <= 1024:
            raise ValueError(f"{path}: not what train.py writes: " + (
                f"{min(unknown)[:40]!r} is no flag" if unknown else f"threads is {str(threads)[:20]}"))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    run = read(parser, [f"--{name.replace('_', '-')}" + f"={value}" * (value is not True)
                        for name, value in config.items() if name in known and value is not False])
    run.out, run.resume, run.threads = args.resume, args.resume, threads
    return run


def add_common_flags(parser):
    """Those of files, folders and the machine."""
    add = parser.add_argument_group("samples").add_argument
    add("--data-dir", type=Path, metavar="DIR", help="where the files of the paper's data sets lie; python "
        "-m data.download gets them (default: datasets)")
    add("--pooling", choices=("auto", "first", "mean"), default="auto", help="phi(x) is the first token's "
        "last hidden state, as in the paper, or the mean over tokens; auto: what the checkpoint's "
        "1_Pooling/config.json says, if there is one, else first (default: auto)")
    add("--language", type=int, metavar="N", help="of tiny's texts; --model has to be an encoder made for it "
        f"by python -m lab.pretrain --seed N (default: {tiny.LANGUAGE}, that of --model tiny)")
    add("--max-length", type=int, default=128, metavar="L", help="cut texts to L tokens (default: 128)")
    add("--max-train", type=int, metavar="N", help="keep N training samples, by seed")
    add("--max-test", type=int, metavar="N", help="keep N samples of test and of each OOD split, for every "
        "seed the same; 0 leaves them alone, as when hyper-parameters are chosen")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=0, metavar="S", help="of the random head, LoRA, dropout and order; the "
        "same numbers come out on one machine, on its CPU, with one number of threads (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="auto takes cuda, else mps, else cpu (default: auto)")
    add("--out", type=Path, metavar="DIR", help="folder for config.json, metrics.jsonl, result.json and the "
        "weights; must not hold anything yet (default: a new one under runs/)")
    add("--resume", type=Path, metavar="RUN_DIR", help="go on with the unfinished run in RUN_DIR, with its "
        "own flags; stands alone")
    add("--export", type=Path, metavar="DIR", help="also write the result for other tools: a Hugging Face "
        "folder (LoRA merged), head.safetensors, and with --lora a peft folder, DIR/adapter")


def check(parser, args):
    """Refuse, in one sentence, flags that do not go together and numbers out of range."""
    given = {name: value for name, value in vars(args).items() if value is not None and value is not False}
    stage, lora = ("epochs", "batch_size", "lr", "head_scale"), ("lora_r", "lora_alpha")
    other = f"--data is {args.data}, not one of "
    for useless, names, why in (
            (args.method == "lp", (*stage, "ntk", "lora"), "--method lp has no FT stage"),
            (not args.lora, lora, "it needs --lora"),
            (args.method == "ft", ("lp_scoring", "lp_inverse_l2"), "--method ft does no linear probing"),
            (args.data not in tiny.TASKS, ("language",), other + ", ".join(tiny.TASKS)),
            (args.data not in CORPORA, ("data_dir",), other + ", ".join(CORPORA)),
            (args.lp_inverse_l2, ("lp_scoring",), "--lp-inverse-l2 fixes the penalty")):
        for name in names:
            if useless and name in given:
                parser.error(f"--{name.replace('_', '-')} has no effect: {why}")
    for name in (*stage, *lora, "lp_inverse_l2", "max_train"):
        if not 0 < given.get(name, 1) < 1e15:
            parser.error(f"--{name.replace('_', '-')} is {str(given[name])[:20]}; expected a number above 0")
    for name, least, most in (("ntk", 1, 250), ("max_test", 0, 10**15), ("language", 0, 10**6),
                              ("max_length", 8, 10**6), ("seed", 0, 2**32 - 1)):
        if not least <= given.get(name, least) <= most:
            parser.error(f"--{name.replace('_', '-')} is {given[name]}; expected {least} to {most}")


def fill_defaults(args):
    if args.method != "lp":
        # the learning rate belongs to the encoder first, to the task second
        name = args.data if args.data in CORPORA else "folder"
        if args.model == "tiny" or language_of(args.model) is not None:
            name = "tiny-distractors" if args.data == "tiny-distractors" else "tiny"
        batch_size, lr = RECIPES[name][STAGES.index((args.method, args.lora))]
        args.epochs = args.epochs or 10
        args.batch_size = args.batch_size or batch_size
        args.lr = args.lr or lr
    if args.lora:
        args.lora_r, args.lora_alpha = args.lora_r or 8, args.lora_alpha or 8.0
    if args.data in tiny.TASKS:
        args.language = tiny.LANGUAGE if args.language is None else args.language
    if args.data in CORPORA:
        args.data_dir = args.data_dir or Path("datasets")
    if args.method != "ft" and args.lp_inverse_l2 is None:
        args.lp_scoring = args.lp_scoring or ("log-loss" if args.data in tiny.TASKS else "accuracy")
    for name in ("model", "data", "data_dir", "export"):  # so that --resume works from any folder
        value = getattr(args, name)
        names = (None, "tiny", *tiny.TASKS, *CORPORA)
        if isinstance(value, Path) or value not in names and Path(value).is_dir():
            setattr(args, name, type(value)(os.path.abspath(value)))
    return args


def language_of(model):
    """The language that a tiny encoder was made for; None for any other."""
    path = Path(tiny.ENCODER if model == "tiny" else model) / "config.json"
    try:
        language = read_json(path).get("language")
        return language if isinstance(language, int) else None  # of other encoders it may be "en"
    except (ValueError, OSError):  # loading it will say what is wrong
        return None


def configuration(args, *without):
    """The flags, defaults filled in, as values that JSON has."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
            if value is not None and name not in ("resume", "threads", *without)}


def check_task(args, task, tokenizer, config):
    """ValueError for flags, data and encoder that do not fit each other."""
    if args.max_length > config.max_length:
        raise ValueError(f"--max-length {args.max_length}: {args.model} has positions for "
                         f"{config.max_length} tokens at most; expected {config.max_length} or less")
    made_for = language_of(args.model)
    if args.data in tiny.TASKS and made_for not in (None, args.language):
        raise ValueError(f"--language {args.language}: the encoder {args.model} was made for --language "
                         f"{made_for}; lab.pretrain --seed {args.language} makes another for --model")
    unknown, tokens = count_unknown(tokenizer, task.splits["train"], task.pairs)
    if args.model == "tiny" and unknown > 0.2 * tokens:
        raise ValueError(f"--data {args.data}: {100 * unknown / tokens:.0f} % of its tokens are words that "
                         "--model tiny does not know; give --model a folder with a pre-trained checkpoint")
    types = max(int(split.types.max()) for split in task.splits.values())
    if 0 < config.type_vocab_size <= types:
        raise ValueError(f"--model {args.model}: has {config.type_vocab_size} token type, but its tokenizer "
                         f"gives the second text of a pair type {types}")
    if args.ntk:
        draw_ntk_samples(args.ntk, args.seed, task)  # refuses too few now, before minutes of work
    counts = task.splits["train"].labels.bincount(minlength=len(task.labels))
    if args.lp_scoring and counts.min() < 5:
        raise ValueError(f"--data {args.data}: 5-fold cross-validation needs 5 training samples of each "
                         f"class, {task.labels[counts.argmin()]!r} has {counts.min()}; take more samples, or "
                         "fix LP's penalty with --lp-inverse-l2")
    if args.lora and args.lora_r > config.hidden_size:
        raise ValueError(f"--lora-r {args.lora_r}: more than the width {config.hidden_size} of {args.model}")


def print_configuration(args, task, encoder):
    print("configuration")
    for name, value in configuration(args).items():
        if value is not False:  # a flag like --lora is there or not
            about = f"   ({describe(torch.device(value))})" if name == "device" else ""
            print(f"  --{name.replace('_', '-'):16s}{value if value is not True else ''}{about}".rstrip())
    sizes = ", ".join(f"{name} {len(split)}" for name, split in task.splits.items())
    print(f"  samples           {sizes}\n  classes           {', '.join(task.labels)}")
    phi = "the first token" if encoder.config.pooling == "first" else "the mean over tokens"
    print(f"  features          {phi}")
    if len(task.splits["val"]) < 30:
        print("  note              val is small: what is chosen by it is luck to a large part")
    if task.skipped:
        counts = ", ".join(f"{name} {count}" for name, count in task.skipped.items())
        print(f"  skipped           rows without text: {counts}")
