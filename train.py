"""Train a text classifier with LP, FT or LP-FT, with or without LoRA, and say what happened.

    python train.py --method lpft --lora                          the embedded benchmark, seconds
    python train.py --method ft --model roberta-base --data cb    a real encoder, real data

One run, top to bottom: read the flags (parse_args), load the encoder and the task, linear probing,
the FT stage (run), measure (evaluate), write and print. The method itself is in `lpft.py`.

A run that was interrupted, killed or out of power goes on from its folder, to the same numbers:
`python train.py --resume RUN_DIR`.

Exit status: 0 done, 2 bad input (one line says what), 1 a full disk or memory, a solver that did not
converge, 130 interrupted.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import signal
import sys
from pathlib import Path

import plumbing  # noqa: F401  before torch
import numpy as np
import tokenizers
import torch
from tqdm import tqdm

import ntk
from plumbing.checkpoint import read_json
from data import count_unknown, evaluation_batches, load_task, read_task, tiny
from data.corpora import CORPORA, RECIPES
from plumbing.export import export_classifier, save_classifier
from lpft import LinearProbe
from lpft import (METRICS, NotFinite, accuracy, calibration_error, device_of, feature_statistics, fine_tune,
                  fit_linear_probe, fit_temperature, logits_of, mixed_precision, predict, set_head, to_device,
                  why_no_temperature)
from model import Classifier, add_lora, count_parameters
from plumbing.checkpoint import load_pretrained
from plumbing.run_folder import UNFINISHED, StateFile, claim_folders, memory_advice, release_folders, status_of, write_whole

STAGES = (("ft", False), ("ft", True), ("lpft", False), ("lpft", True))  # (method, LoRA)


def parse_args(argv=None):
    """The flags, with every default filled in; meaningless ones end in one line and status 2."""
    parser = argparse.ArgumentParser(
        description="Train a text classifier by linear probing (lp), fine-tuning (ft) or linear "
                    "probing then fine-tuning (lpft), and measure accuracy, features, calibration.",
        epilog="Example: python train.py --method lpft --lora", allow_abbrev=False)
    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=("lp", "ft", "lpft"), default="lpft",
                        help="lp: fit the head on frozen features; ft: train everything from a random "
                             "head; lpft: lp, then ft from its head (default: %(default)s)")
    method.add_argument("--lora", action="store_true",
                        help="in the FT stage train low-rank updates of the query and value "
                             "projections instead of the whole encoder")
    method.add_argument("--lora-r", type=int, metavar="R", help="rank of the updates (default: 8)")
    method.add_argument("--lora-alpha", type=float, metavar="A",
                        help="updates are scaled by A / R (default: 8)")
    method.add_argument("--lp-scoring", choices=("accuracy", "log-loss"),
                        help="what cross-validation picks the LP penalty by (default: accuracy)")
    method.add_argument("--lp-inverse-l2", type=float, metavar="C",
                        help="fix the LP penalty (scikit-learn's C) instead of cross-validating it")
    data = parser.add_argument_group("model and data")
    data.add_argument("--model", default="tiny", metavar="{tiny,DIR,HUB}",
                      help="tiny: the embedded encoder, in data/tiny_encoder; or a folder with a BERT "
                           "or RoBERTa checkpoint; or its name on the Hugging Face hub, such as "
                           "roberta-base (default: tiny)")
    data.add_argument("--data", default="tiny", metavar="{tiny,tiny-plain,NAME,DIR}",
                      help=f"an embedded task; one of the paper's, {', '.join(CORPORA)}; or a folder with "
                           "train, and maybe val, test, ood_NAME, each .tsv, .csv or .jsonl with text (or "
                           "text_a, text_b) and label (default: tiny)")
    data.add_argument("--data-dir", type=Path, metavar="DIR",
                      help="where the files of the paper's data sets lie; python -m data.download gets them "
                           "(default: datasets)")
    data.add_argument("--max-length", type=int, default=128, metavar="L",
                      help="cut texts to this many tokens (default: %(default)s)")
    data.add_argument("--max-train", type=int, metavar="N", help="keep N training samples, by seed")
    data.add_argument("--max-test", type=int, metavar="N",
                      help="keep N samples of test and of each OOD split, for every seed the same; 0 leaves them "
                           "alone, as when hyper-parameters are chosen")
    stage = parser.add_argument_group("FT stage (defaults depend on method, model and data, and are printed)")
    stage.add_argument("--epochs", type=int, metavar="N",
                       help="the best on validation is kept (default: 10)")
    stage.add_argument("--batch-size", type=int, metavar="N", help="samples per step")
    stage.add_argument("--lr", type=float, metavar="LR", help="learning rate at the first step")
    stage.add_argument("--head-scale", type=float, metavar="S",
                       help="multiply the head it starts from, random or LP's, by S (Fig. 3; default: 1)")
    stage.add_argument("--ntk", type=int, nargs="?", const=250, metavar="N",
                       help="before its first step, compute the neural tangent kernel on N training and "
                            "N test samples (1 to 250; 250 if no number is given)")
    run_group = parser.add_argument_group("run")
    run_group.add_argument("--seed", type=int, default=0, metavar="S",
                           help="of the random head, LoRA, dropout and order; the same numbers come out on "
                                "one machine, on its CPU, with one number of threads (default: %(default)s)")
    run_group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                           help="auto takes cuda, else mps, else cpu (default: %(default)s)")
    run_group.add_argument("--num-workers", type=int, metavar="N",
                           help="processes that prepare batches ahead of the steps (default: 0, none)")
    run_group.add_argument("--out", type=Path, metavar="DIR",
                           help="folder for config.json, metrics.jsonl, result.json and the weights; "
                                "must not hold anything yet (default: a new one under runs/)")
    run_group.add_argument("--save-every", type=float, metavar="S",
                           help="progress is saved after each epoch, and within one when S seconds have passed "
                                "(default: 60)")
    run_group.add_argument("--resume", type=Path, metavar="RUN_DIR",
                           help="go on with the unfinished run in RUN_DIR, with its own flags; stands alone")
    run_group.add_argument("--export", type=Path, metavar="DIR",
                           help="also write the result for other tools: a Hugging Face folder (LoRA merged), "
                                "head.safetensors, and with --lora a peft folder, DIR/adapter")
    parser.error = lambda message: parser.exit(2, f"train.py: error: {message}\n")  # one line, no usage
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.resume:
        if len(argv) > 2 or sum(word.startswith("--") for word in argv) > 1:
            parser.error(f"--resume goes on with the flags in {args.resume / 'config.json'}; expected no other flag")
        return resumed_args(parser, args.resume)
    check_flags(parser, args)
    return fill_defaults(args)


def resumed_args(parser, folder):
    """The flags of the run in `folder`, checked as if they were given anew."""
    path = folder / "config.json"
    try:
        if not path.is_file():
            raise ValueError(f"--resume {str(folder)[:200]}: holds no config.json; expected the folder of a run")
        config = read_json(path)
        threads, known = config.pop("threads", None), vars(parser.parse_args([])).keys() - {"resume"}
        unknown = config.keys() - known - {"versions"}
        if unknown or type(threads) is not int or not 1 <= threads <= 1024:
            raise ValueError(f"{path}: not what train.py writes: " + (
                f"{min(unknown)[:40]!r} is no flag" if unknown else f"threads is {str(threads)[:20]}"))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    args = parse_args([f"--{name.replace('_', '-')}" + f"={value}" * (value is not True)
                       for name, value in config.items() if name in known and value is not False])
    args.out, args.resume, args.threads = folder, folder, threads
    return args


def check_flags(parser, args):
    """Refuse, in one sentence, flags that do not go together and numbers out of range."""
    stage = {"--epochs": args.epochs, "--batch-size": args.batch_size, "--lr": args.lr,
             "--head-scale": args.head_scale}
    loop = {"--num-workers": (args.num_workers, 64), "--save-every": (args.save_every, 1e9)}
    lora = {"--lora-r": args.lora_r, "--lora-alpha": args.lora_alpha}
    probe = {"--lp-scoring": args.lp_scoring, "--lp-inverse-l2": args.lp_inverse_l2}
    if args.method == "lp" and args.lora:
        parser.error("--method lp trains only the head, so --lora has nothing to adapt; "
                     "use --method ft or lpft")
    if args.ntk is not None and not 1 <= args.ntk <= 250:
        parser.error(f"--ntk is {args.ntk}; expected 1 to 250")
    of_ft = stage | {"--ntk": args.ntk} | {flag: value for flag, (value, _) in loop.items()}
    for flags, wrong, why in ((of_ft, args.method == "lp", "--method lp has no FT stage"),
                              (lora, not args.lora, "it needs --lora"),
                              (probe, args.method == "ft", "--method ft does no linear probing")):
        for flag, value in flags.items():
            if wrong and value is not None:
                parser.error(f"{flag} has no effect: {why}")
    if args.data_dir and args.data not in CORPORA:
        parser.error(f"--data-dir has no effect: --data is {args.data}, not one of {', '.join(CORPORA)}")
    if args.lp_scoring and args.lp_inverse_l2 is not None:
        parser.error("--lp-scoring has no effect: --lp-inverse-l2 fixes the penalty")
    positive = stage | lora | {"--lp-inverse-l2": args.lp_inverse_l2, "--max-train": args.max_train}
    for flag, value in positive.items():
        if value is not None and not 0 < value < 1e15:
            parser.error(f"{flag} is {str(value)[:20]}; expected a number above 0, below 1e15")
    if args.max_test is not None and args.max_test < 0:
        parser.error(f"--max-test is {args.max_test}; expected 0 or more")
    if args.max_length < 8:
        parser.error(f"--max-length is {args.max_length}; expected 8 or more")
    for flag, (value, most) in loop.items():
        if value is not None and not 0 <= value <= most:
            parser.error(f"{flag} is {value:g}; expected 0 to {most:g}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed is {args.seed}; expected 0 to {2**32 - 1}")


def fill_defaults(args):
    if args.method != "lp":
        # the learning rate belongs to the encoder first, to the task second
        fallback, own = ("tiny", tiny.TRAIN_SIZES) if args.model == "tiny" else ("folder", CORPORA)
        recipe = RECIPES[args.data if args.data in own else fallback]
        batch_size, lr = recipe[STAGES.index((args.method, args.lora))]
        args.epochs = args.epochs or 10
        args.batch_size = args.batch_size or batch_size
        args.lr = args.lr or lr
        args.num_workers = args.num_workers or 0
    if args.lora:
        args.lora_r, args.lora_alpha = args.lora_r or 8, args.lora_alpha or 8.0
    if args.data in CORPORA:
        args.data_dir = args.data_dir or Path("datasets")
    if args.method != "ft" and args.lp_inverse_l2 is None:
        args.lp_scoring = args.lp_scoring or "accuracy"
    for name in ("model", "data", "data_dir", "export"):  # so that --resume works from any folder
        value = getattr(args, name)
        if isinstance(value, Path) or value not in (None, "tiny", *tiny.TRAIN_SIZES, *CORPORA) and Path(value).is_dir():
            setattr(args, name, type(value)(os.path.abspath(value)))
    return args


def choose_device(name):
    """(torch.device, why it was chosen); ValueError if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
        why = "no CUDA or MPS device found" if name == "cpu" else "found by --device auto"
    else:
        why = f"asked for by --device {name}"
    if not available[name]:
        raise ValueError(f"--device {name}: this PyTorch ({torch.__version__}) finds no such device; "
                         f"available: {', '.join(kind for kind, there in available.items() if there)}")
    if name == "cuda":
        why += f", {torch.cuda.get_device_name()}"
    with mixed_precision(torch.device(name)):
        precision = "bfloat16 autocast" if torch.is_autocast_enabled(name) else "float32"
    return torch.device(name), f"{why}, {precision} in the FT stage"


# ---------------------------------------------------------------------------- one run


def run(args):
    """One run in a folder that it holds alone; returns the dict that result.json holds."""
    device, why = choose_device(args.device)
    args.device = device.type
    lock, made = claim_folders(args)  # before minutes of work, so that an unusable --out costs none
    try:
        if (args.out / "result.json").is_file():
            print(f"finished already: {args.out}")
            result = read_json(args.out / "result.json")
        else:
            every = 60.0 if args.save_every is None else args.save_every
            if args.resume:
                torch.set_num_threads(args.threads)  # another number adds in another order
                state = StateFile.of(args.out / "state", every)
            else:
                write_json(args.out / "config.json", configuration(args) | {
                    "threads": torch.get_num_threads(),
                    "versions": {"python": platform.python_version(), "torch": torch.__version__,
                                 "tokenizers": tokenizers.__version__, "numpy": np.__version__}})
                state = StateFile(args.out / "state", every=every)
            with memory_advice("--max-length, --batch-size or --max-train"):
                result = load_train_measure(args, device, why, state)
        (args.out / "state").unlink(missing_ok=True)
        if args.export:
            (args.export / UNFINISHED).unlink(missing_ok=True)
        return result
    except Exception:
        if not (args.resume or (args.out / "state").is_file()):
            release_folders(args, lock, made)
        raise
    finally:
        lock.release()


def configuration(args):
    """The flags, defaults filled in, as values that JSON has."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
            if value is not None and name not in ("resume", "threads")}


def load_train_measure(args, device, why, state):
    """Load, probe, fine-tune, evaluate, write."""
    rows = read_task(args.data, args.data_dir)
    folder = tiny.ENCODER if args.model == "tiny" else args.model
    encoder, tokenizer = load_pretrained(folder)
    task = load_task(rows, tokenizer, args.max_length, max_train=args.max_train, seed=args.seed,
                     max_test=args.max_test)
    refuse_what_does_not_fit(args, task, tokenizer, encoder.config)
    ntk_samples = None
    if args.ntk:
        labels = {name: split.labels for name, split in task.splits.items()}
        ntk_samples = pick_ntk_samples(args.ntk, args.seed, labels, task.labels)
    refuse_other_start(args, task, encoder, state)
    print_configuration(args, why, task, rows.skipped)

    torch.manual_seed(args.seed)
    model = Classifier(encoder, len(task.labels)).to(device)
    # train and val are for LP alone
    needed = task.test_names if args.method == "ft" or "lp" in state.parts else task.splits
    features_0 = {name: predict(model, task.splits[name], desc=f"features of {name}")[0]
                  for name in needed}  # phi_0(x), before anything moves
    if not all(torch.isfinite(features).all() for features in features_0.values()):
        raise ValueError(f"--model {args.model}: its features hold NaN or infinity; the checkpoint is damaged")
    result = {"method": args.method, "lora": args.lora, "seed": args.seed, "model": args.model,
              "data": args.data, "samples": {name: len(split) for name, split in task.splits.items()}}
    first_head = torch.zeros_like(model.head.weight)  # V_0, where LP starts
    if args.method != "ft":
        result["lp"] = probe(args, model, task, features_0, state)
    if args.method != "lp":
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter *= args.head_scale or 1.0
        first_head = model.head.weight.detach().clone()  # V_0, where the FT stage starts
        if args.lora:
            add_lora(model.encoder, args.lora_r, args.lora_alpha)
        if args.ntk:
            with memory_advice("--ntk or --max-length"):
                result["ntk"] = ntk_stage(args, model, task, ntk_samples, state)
        with memory_advice("--batch-size or --max-length"):
            result["kept_epoch"] = fine_tune_stage(args, model, tokenizer, task, state)
    else:
        model.encoder.requires_grad_(False)
    result |= evaluate(model, task, features_0, frozen=args.method == "lp")
    trainable, total = count_parameters(model)
    result |= {"head_norm_initial": float(first_head.norm()),
               "head_diff": float((model.head.weight.detach() - first_head).norm()), "trainable_parameters": trainable,
               "total_parameters": total, "seconds": round(state.seconds(), 2)}
    save_classifier(args.out, model, tokenizer, task, result["temperature"], args.max_length, args.data,
                    result["temperature_reason"])
    if args.export:
        export_classifier(args.export, model, tokenizer, task, result["temperature"], args.max_length, folder)
    write_json(args.out / "result.json", result)  # last: a folder that has it is finished
    print_table(args, result)
    return result


def refuse_other_start(args, task, encoder, state):
    """ValueError if the state is of a run with other flags, data or weights; a new state gets them."""
    digest = hashlib.sha256()
    for split in task.splits.values():
        for array in (split.ids, split.types, split.lengths, split.labels.numpy()):
            digest.update(np.ascontiguousarray(array))
    for tensor in encoder.state_dict().values():
        digest.update(np.ascontiguousarray(tensor.numpy()))
    neutral = ("out", "export", "num_workers", "save_every")  # no number depends on them
    start = {f"--{name.replace('_', '-')}": value for name, value in configuration(args).items() if name not in neutral}
    start["data and encoder"] = digest.hexdigest()
    before = state.parts.get("start", {} if state.parts else start)
    for name in sorted(before | start):
        if before.get(name) != start.get(name):
            raise ValueError(f"{state.path}: was saved with {name} {str(before.get(name))[:40]}, now it is "
                             f"{str(start.get(name))[:40]}; start a new run")
    state.parts["start"] = start


def refuse_what_does_not_fit(args, task, tokenizer, config):
    """ValueError for text that the encoder cannot read: too long, of too many types, or, for the tiny one, of words
    that are not of its own language; for classes with too few samples for LP; and for LoRA that is no low-rank update."""
    if args.max_length > config.max_length:
        raise ValueError(f"--max-length {args.max_length}: {args.model} has positions for {config.max_length} tokens "
                         "at most")
    unknown, tokens = count_unknown(tokenizer, task.splits["train"], task.pairs)
    if args.model == "tiny" and unknown > 0.2 * tokens:
        raise ValueError(f"--data {args.data}: {100 * unknown / tokens:.0f} % of its tokens are words that "
                         "--model tiny does not know; give --model a folder with a pre-trained checkpoint")
    types = max(int(split.types.max()) for split in task.splits.values())
    if 0 < config.type_vocab_size <= types:
        raise ValueError(f"--model {args.model}: has {config.type_vocab_size} token type, but its tokenizer "
                         f"gives the second text of a pair type {types}")
    counts = task.splits["train"].labels.bincount(minlength=len(task.labels))
    if args.lp_scoring and counts.min() < 5:
        raise ValueError(f"--data {args.data}: 5-fold cross-validation needs 5 training samples of each class, "
                         f"{task.labels[counts.argmin()]!r} has {counts.min()}; take more samples, or fix LP's "
                         "strength with --lp-inverse-l2")
    if args.lora and args.lora_r > config.hidden_size:
        raise ValueError(f"--lora-r {args.lora_r}: more than the width {config.hidden_size} of {args.model}")


def probe(args, model, task, features_0, state):
    """The LP stage: fit the head on phi_0 of the training split and put it in the model."""
    if "lp" in state.parts:
        done = state.parts["lp"]
        set_head(model, LinearProbe(done["weight"], done["bias"], None, None, None))
        print("\nLP    done before")
        return done["record"]
    labels = task.splits["train"].labels
    size, (_, total) = model.head.weight.numel() + model.head.bias.numel(), count_parameters(model)
    print(f"\nLP    trains the head alone, on {len(labels)} fixed features: {size:,} of {total:,} "
          f"parameters ({100 * size / total:.3g} %)")
    found = fit_linear_probe(features_0["train"], labels, len(task.labels), args.lp_inverse_l2,
                             args.lp_scoring)
    set_head(model, found)
    logits = {name: logits_of(model, features_0[name]) for name in ("train", "val")}
    record = {"stage": "lp", "inverse_l2": found.inverse_l2,
              "train_accuracy": accuracy(logits["train"], labels),
              "val_accuracy": accuracy(logits["val"], task.splits["val"].labels),
              f"val_{task.metric}": METRICS[task.metric](logits["val"], task.splits["val"].labels),
              "head_norm": float(found.weight.norm()), "path": found.path}
    chosen = f"fixed, C = {found.inverse_l2:.4g}"
    if found.scores is not None:
        chosen = f"by 5-fold {args.lp_scoring}, C = {found.inverse_l2:.4g}"
    print(f"LP    strength {chosen};  train {record['train_accuracy']:.3f}  "
          f"{val_title(task)} {record[f'val_{task.metric}']:.3f}  head norm {record['head_norm']:.3f}")
    if args.lp_scoring == "accuracy" and record["train_accuracy"] > record["val_accuracy"] + 0.2:
        print("LP    train is far above val: the head may know its samples by heart; try --lp-scoring log-loss, "
              "which mostly picks a smaller one")
    write_lines(args.out / "metrics.jsonl", [record])
    state.save(lp={"record": record, "weight": found.weight, "bias": found.bias})
    return record


def val_title(task):
    return "val" if task.metric == "accuracy" else f"val {task.metric}"  # train's is always accuracy


def pick_ntk_samples(count, seed, labels, classes):
    """{split: indices} of the samples of --ntk, in random order: of train, and of test or else val.

    `labels` {split: (N,)}, class indices; `classes` their names.
    """
    generator, picked = torch.Generator().manual_seed(seed), {}
    for name in ("train", "test" if "test" in labels else "val"):
        picked[name] = torch.randperm(len(labels[name]), generator=generator)[:count].numpy()
    counts = torch.as_tensor(labels["train"])[picked["train"]].bincount(minlength=len(classes))
    if counts.min() < 5:
        raise ValueError(f"--ntk {count}: the {counts.sum()} training samples drawn with seed {seed} have "
                         f"{counts.min()} of class {classes[counts.argmin()]}; kernel regression needs 5 of each, so "
                         "a larger N or more data")
    return picked


def ntk_stage(args, model, task, picked, state):
    """Table 2 at the start of the FT stage, printed; the kernels go to ntk.npz."""
    if "ntk" in state.parts:
        print("\nNTK   done before")
        return state.parts["ntk"]
    print()
    (train, train_indices), (test, test_indices) = ((task.splits[n], i) for n, i in picked.items())
    batches, places = [], []
    for split, indices in ((train, train_indices), (test, test_indices)):
        order = evaluation_batches(split.lengths[indices], 16)  # little padding
        batches.append([split.batch(indices[some])[0] for some in order])
        places.append(np.concatenate(order).argsort())  # where each sample is in the batches
    labels, test_labels = train.labels[train_indices], test.labels[test_indices]
    found = ntk.empirical_ntk(model.eval(), *batches)
    # back to random order, from which kernel regression deals its folds
    found = ntk.NTK(*(kernel[rows][:, :, places[0]] for kernel, rows in (
        (found.pretrain, places[0]), (found.ft, places[0]), (found.test_pretrain, places[1]),
        (found.test_ft, places[1]))))
    with torch.no_grad():
        device = device_of(model)
        logits = torch.cat([model(**to_device(batch, device)).cpu() for batch in batches[0]])  # (N, C)
    deltas = ntk.initial_deltas(logits[places[0]], labels)
    result = {"train_samples": len(labels), "test_samples": len(test_labels), "test_split": [*picked][1],
              "ft_ratio": ntk.ft_ratio(found, deltas)}
    print(f"\n{'kernel':8s}{'rank':>6s}{'Frobenius':>12s}{'train':>9s}{'test':>8s}"
          f"{'train/logit':>13s}{'test/logit':>12s}{'FT ratio':>10s}")
    for name, kernel, test_kernel in (
            ("P", found.pretrain, found.test_pretrain), ("F", found.ft, found.test_ft),
            ("Theta", found.pretrain + found.ft, found.test_pretrain + found.test_ft)):
        statistics = ntk.kernel_statistics(kernel)
        row = {key: statistics[key] for key in ("rank", "frobenius")}
        row |= ntk.kernel_regression(kernel, labels, test_kernel, test_labels)
        row["singular_values"] = statistics["singular_values"].tolist()
        result[name] = row
        print(f"{name:8s}{row['rank']:6d}{row['frobenius']:12.1f}{row['train_accuracy']:9.3f}"
              f"{row['test_accuracy']:8.3f}{row['train_logit_accuracy']:13.3f}"
              f"{row['test_logit_accuracy']:12.3f}" + f"{result['ft_ratio']:10.3f}" * (name == "F"))
    print(f"train, test: class accuracy of kernel regression, tested on {result['test_split']}; /logit: of its "
          "single yes-or-no decisions")
    with write_whole(args.out / "ntk.npz") as file:
        np.savez(file, pretrain=found.pretrain, ft=found.ft, labels=labels, deltas=deltas,
                 test_pretrain=found.test_pretrain, test_ft=found.test_ft, test_labels=test_labels,
                 train_indices=train_indices, test_indices=test_indices)
    state.save(ntk=result)
    return result


def fine_tune_stage(args, model, tokenizer, task, state):
    """The FT stage, on all of the encoder or on LoRA alone, and always on the head."""
    trainable, total = count_parameters(model)
    what = f"LoRA (r = {args.lora_r}) on query and value" if args.lora else "the whole encoder"
    print(f"\nFT    trains {what}, and the head: {trainable:,} of {total:,} parameters "
          f"({100 * trainable / total:.3g} %)\n"
          "FT    epoch 0 is the start, without dropout; then loss and train are means over the epoch, with it")
    lines = [state.parts["lp"]["record"]] if "lp" in state.parts else []

    def on_epoch(record):
        tqdm.write(f"FT    epoch {record['epoch']:2d}  loss {record['loss']:.4f}  "
                   f"train {record['train_accuracy']:.3f}  {val_title(task)} {record[f'val_{task.metric}']:.3f}  "
                   f"head norm {record['head_norm']:.3f}", file=sys.stdout)
        lines.append({"stage": "ft"} | record)
        write_lines(args.out / "metrics.jsonl", lines)

    if "ft" in state.parts:
        for record in state.parts["ft"]["history"]:
            on_epoch(record)
        print("FT    goes on from here")
    try:
        history = fine_tune(model, task.splits["train"], task.splits["val"], lr=args.lr, epochs=args.epochs,
                            batch_size=args.batch_size, seed=args.seed, on_epoch=on_epoch, metric=task.metric,
                            num_workers=args.num_workers, state=state)
    except NotFinite as error:
        if not error.kept_epoch:
            raise
        save_classifier(args.out, model, tokenizer, task, 1.0, args.max_length, args.data,
                        "training ended before its last epoch")
        raise ValueError(f"{error}; the weights of epoch {error.kept_epoch}, the best before, are in "
                         f"{args.out}") from None
    kept = max(history[1:], key=lambda record: record[f"val_{task.metric}"])["epoch"]
    print(f"FT    keeps epoch {kept}, the first after the start with the highest validation {task.metric}")
    return kept


def evaluate(model, task, features_0, frozen=False):
    """Accuracy, features, calibration on every test split; the temperature comes from val.

    `features_0` {split: phi_0}; of a `frozen` encoder these are its features still.
    """
    def outcome(name):  # features (N, h), logits (N, C)
        if frozen and name in features_0:
            return features_0[name], logits_of(model, features_0[name])
        return predict(model, task.splits[name], desc=f"testing on {name}")

    _, logits = outcome("val")
    val_labels = task.splits["val"].labels
    temperature = fit_temperature(logits, val_labels)
    score = METRICS[task.metric]  # accuracy is reported beside any other
    result = {"metric": task.metric, "val_accuracy": accuracy(logits, val_labels),
              f"val_{task.metric}": score(logits, val_labels), "accuracy": {}, task.metric: {},
              "head_norm": float(model.head.weight.detach().norm()), "features": {}, "features_pretrained": {},
              "temperature": temperature, "temperature_reason": why_no_temperature(logits, val_labels),
              "calibration": {}}
    for name in task.test_names:
        labels = task.splits[name].labels
        features, logits = outcome(name)
        result["accuracy"][name] = accuracy(logits, labels)
        result[task.metric][name] = score(logits, labels)
        result["features"][name] = feature_statistics(features, features_0[name], labels)
        result["features_pretrained"][name] = feature_statistics(features_0[name], features_0[name], labels)
        (ece, mce), (ece_scaled, mce_scaled) = (calibration_error(logits, labels),
                                                calibration_error(logits / temperature, labels))
        result["calibration"][name] = {"ece": ece, "mce": mce, "ece_scaled": ece_scaled,
                                       "mce_scaled": mce_scaled}
    return result


# ---------------------------------------------------------------------------- what is written


def print_configuration(args, why, task, skipped):
    print("configuration")
    for name, value in configuration(args).items():
        if value is not False:  # a flag like --lora is there or not
            shown = "" if value is True else f"{value}   ({why})" if name == "device" else value
            print(f"  --{name.replace('_', '-'):16s}{shown}".rstrip())
    sizes = ", ".join(f"{name} {len(split)}" for name, split in task.splits.items())
    print(f"  samples           {sizes}\n  classes           {', '.join(task.labels)}")
    if skipped:
        counts = ", ".join(f"{name} {count}" for name, count in skipped.items())
        print(f"  skipped           rows without text: {counts}")


def print_table(args, result):
    """The final table, then one line that a script can parse."""
    scores = list(dict.fromkeys((result["metric"], "accuracy")))
    titles = [*scores, "ECE", "ECE/T", "MCE", "MCE/T", "CS(F)", "Diff(F)", "FDR(F)", "Norm(F)"]
    print("\n" + " " * 12 + "".join(f"{title:>9s}" for title in titles))
    for name in result["accuracy"]:
        numbers = [result[score][name] for score in scores]
        numbers += [result["calibration"][name][key] for key in ("ece", "ece_scaled", "mce", "mce_scaled")]
        numbers += [result["features"][name][key] for key in ("cs", "diff", "fdr", "norm")]
        print(f"{name[:11]:12s}" + "".join(f"{x:9.3f}" if x < 1e4 else f"{x:9.1e}" for x in numbers))
    if not result["accuracy"]:
        print("no test split: only validation accuracy is known")
    with_t = f"after dividing logits by T = {result['temperature']:.4g}, fitted on validation"
    if result["temperature_reason"]:
        with_t = f"with T = 1, not fitted: {result['temperature_reason']}"
    print(f"\nECE/T, MCE/T: {with_t}. Features: against the pre-trained encoder.\n"
          f"Head norm {result['head_norm_initial']:.3f} -> {result['head_norm']:.3f}.  "
          f"Everything is in {args.out}" + f", for other tools in {args.export}" * bool(args.export) + ".\n")
    name = args.method + "-lora" * args.lora
    line = [f"result: method={name} data={args.data} seed={args.seed}",
            f"val_accuracy={result['val_accuracy']:.4f}"]
    line += [f"{split}_accuracy={score:.4f}" for split, score in result["accuracy"].items()]
    if result["metric"] != "accuracy":
        scores = {"val": result[f"val_{result['metric']}"]} | result[result["metric"]]
        line += [f"{split}_{result['metric']}={score:.4f}" for split, score in scores.items()]
    line += [f"{key}={result[key]:.4f}" for key in ("head_norm", "temperature", "seconds")]
    print(" ".join(line))


def write_json(path, content):
    def plain(value):  # JSON has no NaN and no infinity: null
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_lines(path, [plain(content)], indent=2)


def write_lines(path, records, indent=None):
    with write_whole(path) as file:
        for record in records:
            file.write((json.dumps(record, indent=indent) + "\n").encode("utf-8"))


def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
        return 0
    except (ValueError, OSError) as error:  # bad input: these messages say what and where
        print(f"train.py: error: {error}", file=sys.stderr)
        return status_of(error)
    except (ArithmeticError, MemoryError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        how = ""
        if args.out and (args.out / "config.json").is_file():
            how = f"; go on with: python train.py --resume {shlex.quote(str(args.out))}"
        print(f"\ntrain.py: interrupted{how}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's way to say Ctrl-C
    sys.exit(main())
