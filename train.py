"""Train a text classifier with LP, FT or LP-FT, with or without LoRA, and say what happened.

    python train.py --method lpft --lora                          the embedded benchmark, seconds
    python train.py --method ft --model roberta-base --data cb    a real encoder, real data

Read `run` first: one run, from top to bottom, in the order of the paper. Each line of it needs at most one
other file: the method is in lpft.py, the kernel in ntk.py; files, flags and devices are in plumbing/.

A run that was interrupted goes on after its last whole epoch, to the same numbers: `python train.py --resume
RUN_DIR`. Exit status: 0 done, 2 bad input (one line says what), 1 a full disk or memory or a solver that did not
converge, 130 interrupted.
"""

import signal
import sys
from pathlib import Path

import plumbing  # noqa: F401  before torch
import numpy as np
import torch
from tqdm import tqdm

import ntk
from data import evaluation_batches, load_task, read_task, tiny
from data.corpora import CORPORA
from lpft import (METRICS, NotFinite, accuracy, best_epoch, calibration_error, feature_statistics, fine_tune,
                  fit_linear_probe, fit_temperature, logits_of, predict, set_head, why_no_temperature)
from model import Classifier, add_lora, count_parameters
from plumbing import checkpoint, devices, export, files, flags, run_folder

# ---------------------------------------------------------------------------- the flags


def build_parser():
    """The flags of one run; --help shows them."""
    parser = flags.Parser("train.py", description="Train a text classifier by linear probing (lp), fine-tuning (ft) or "
                          "linear probing then fine-tuning (lpft); measure accuracy, features, calibration.",
                          epilog="Example: python train.py --method lpft --lora")
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=("lp", "ft", "lpft"), default="lpft", help="lp: fit the head on frozen features; ft: train "
        "everything from a random head; lpft: lp, then ft from its head (default: %(default)s)")
    add("--lora", action="store_true", help="in the FT stage train low-rank updates of the query and value "
        "projections instead of the whole encoder")
    add("--lora-r", type=int, metavar="R", help="rank of the updates (default: 8)")
    add("--lora-alpha", type=float, metavar="A", help="updates are scaled by A / R (default: 8)")
    add("--lp-scoring", choices=("accuracy", "log-loss"), help="what cross-validation picks the LP penalty by "
        "(default: accuracy)")
    add("--lp-inverse-l2", type=float, metavar="C", help="fix the LP penalty (scikit-learn's C) instead")
    add = parser.add_argument_group("model and data").add_argument
    add("--model", default="tiny", metavar="{tiny,DIR,HUB}", help="tiny: the encoder in data/tiny_encoder; or a folder "
        "with a BERT or RoBERTa checkpoint; or its name on the Hugging Face hub, such as roberta-base (default: tiny)")
    add("--data", default="tiny", metavar="{tiny,tiny-plain,NAME,DIR}", help="an embedded task; one of the paper's, "
        f"{', '.join(CORPORA)}; or a folder with train, and maybe val, test, ood_NAME, each .tsv, .csv or .jsonl "
        "with text (or text_a, text_b) and label (default: tiny)")
    add("--data-dir", type=Path, metavar="DIR", help="where the files of the paper's data sets lie; python -m "
        "data.download gets them (default: datasets)")
    add("--max-length", type=int, default=128, metavar="L", help="cut texts to this many tokens (default: %(default)s)")
    add("--max-train", type=int, metavar="N", help="keep N training samples, by seed")
    add("--max-test", type=int, metavar="N", help="keep N samples of test and of each OOD split, for every seed the "
        "same; 0 leaves them alone, as when hyper-parameters are chosen")
    add_stage_flags(parser)
    return parser


def add_stage_flags(parser):
    add = parser.add_argument_group("FT stage (defaults depend on method, model and data, and are printed)").add_argument
    add("--epochs", type=int, metavar="N", help="the best on validation is kept (default: 10)")
    add("--batch-size", type=int, metavar="N", help="samples per step")
    add("--lr", type=float, metavar="LR", help="learning rate at the first step")
    add("--head-scale", type=float, metavar="S", help="multiply the head it starts from, random or LP's, by S (Fig. 3; "
        "default: 1)")
    add("--ntk", type=int, nargs="?", const=250, metavar="N", help="before its first step, compute the neural tangent "
        "kernel on N training and N test samples (1 to 250; 250 if no number is given)")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=0, metavar="S", help="of the random head, LoRA, dropout and order; the same numbers "
        "come out on one machine, on its CPU, with one number of threads (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto takes cuda, else mps, else cpu "
        "(default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="folder for config.json, metrics.jsonl, result.json and the weights; "
        "must not hold anything yet (default: a new one under runs/)")
    add("--resume", type=Path, metavar="RUN_DIR", help="go on with the unfinished run in RUN_DIR, with its own flags; "
        "stands alone")
    add("--export", type=Path, metavar="DIR", help="also write the result for other tools: a Hugging Face folder (LoRA "
        "merged), head.safetensors, and with --lora a peft folder, DIR/adapter")


def parse_args(argv=None):
    """The flags, with every default filled in; meaningless ones end in one line and status 2."""
    return flags.read(build_parser(), argv)


# ---------------------------------------------------------------------------- one run


def run(args, state):
    """One run, in the order of the paper; returns the dict that result.json holds."""
    task, encoder, tokenizer = load(args)
    state.load(flags.identity(args) | {"data and encoder": run_folder.fingerprint(task, encoder)})
    print_configuration(args, task)
    torch.manual_seed(args.seed)
    model = Classifier(encoder, len(task.labels)).to(args.device)
    features_0 = features_of(model, task, args)  # phi_0(x), before anything moves
    result = {"method": args.method, "lora": args.lora, "seed": args.seed, "model": args.model, "data": args.data,
              "samples": {name: len(split) for name, split in task.splits.items()}}

    lines = []  # of metrics.jsonl
    head_0 = torch.zeros_like(model.head.weight)  # V_0, where LP starts
    if args.method != "ft":  # LP: the head alone
        result["lp"] = lp_stage(args, model, task, features_0)
        lines = [result["lp"]]
        files.write_lines(args.out / "metrics.jsonl", lines)
    if args.method != "lp":  # FT: from the random head, or from LP's
        with torch.no_grad():
            model.head.weight *= args.head_scale or 1.0
            model.head.bias *= args.head_scale or 1.0
        head_0 = model.head.weight.detach().clone()  # V_0, where the FT stage starts
        if args.lora:
            add_lora(model.encoder, args.lora_r, args.lora_alpha)
        if args.ntk:  # Theta = P + F where the FT stage starts
            result["ntk"] = ntk_stage(args, model, task)
        result["kept_epoch"] = ft_stage(args, model, tokenizer, task, state, lines)
    else:
        model.encoder.requires_grad_(False)

    result |= evaluate(model, task, features_0, frozen=args.method == "lp")
    trainable, total = count_parameters(model)
    result |= {"head_norm_initial": float(head_0.norm()), "trainable_parameters": trainable, "total_parameters": total,
               "head_diff": float((model.head.weight.detach() - head_0).norm()), "seconds": round(state.seconds(), 2)}
    export.save_classifier(args.out, model, tokenizer, task, result["temperature"], args.max_length, args.data,
                           result["temperature_reason"])
    if args.export:
        export.export_classifier(args.export, model, tokenizer, task, result["temperature"], args.max_length,
                                 tiny.ENCODER if args.model == "tiny" else args.model)
    files.write_json(args.out / "result.json", result)  # last: a folder that has it is finished
    print_table(args, result)
    return result


def load(args):
    """(Task, Encoder, Tokenizer); ValueError for data, encoder and flags that do not fit each other."""
    rows = read_task(args.data, args.data_dir)
    encoder, tokenizer = checkpoint.load_pretrained(tiny.ENCODER if args.model == "tiny" else args.model)
    task = load_task(rows, tokenizer, args.max_length, None, args.max_train, args.seed, args.max_test)
    flags.check_task(args, task, tokenizer, encoder.config)
    if args.ntk:  # too few samples are refused now, before minutes of work
        pick_ntk_samples(args.ntk, args.seed, {name: split.labels for name, split in task.splits.items()}, task.labels)
    return task, encoder, tokenizer


def features_of(model, task, args):
    """{split: phi_0 (N, h)}; train and val are for LP alone."""
    features_0 = {name: predict(model, task.splits[name], desc=f"features of {name}")[0]
                  for name in (task.test_names if args.method == "ft" else task.splits)}
    if not all(torch.isfinite(features).all() for features in features_0.values()):
        raise ValueError(f"--model {args.model}: its features hold NaN or infinity; the checkpoint is damaged")
    return features_0


def lp_stage(args, model, task, features_0):
    """Linear probing: fit the head on phi_0 of the training split and put it in the model."""
    labels, val_labels = task.splits["train"].labels, task.splits["val"].labels
    size, (_, total) = model.head.weight.numel() + model.head.bias.numel(), count_parameters(model)
    print(f"\nLP    trains the head alone, on {len(labels)} fixed features: {size:,} of {total:,} "
          f"parameters ({100 * size / total:.3g} %)")
    probe = fit_linear_probe(features_0["train"], labels, len(task.labels), args.lp_inverse_l2, args.lp_scoring)
    set_head(model, probe)
    logits, val_logits = (logits_of(model, features_0[name]) for name in ("train", "val"))  # (N, C)
    record = {"stage": "lp", "inverse_l2": probe.inverse_l2, "train_accuracy": accuracy(logits, labels),
              "val_accuracy": accuracy(val_logits, val_labels),
              f"val_{task.metric}": METRICS[task.metric](val_logits, val_labels),
              "head_norm": float(probe.weight.norm()), "path": probe.path}
    chosen = "fixed" if args.lp_inverse_l2 else f"by 5-fold {args.lp_scoring}"
    print(f"LP    strength {chosen}, C = {probe.inverse_l2:.4g};  train {record['train_accuracy']:.3f}  "
          f"{val_title(task)} {record[f'val_{task.metric}']:.3f}  head norm {record['head_norm']:.3f}")
    if args.lp_scoring == "accuracy" and record["train_accuracy"] > record["val_accuracy"] + 0.2:
        print("LP    train is far above val: the head may know its samples by heart; try --lp-scoring log-loss, "
              "which mostly picks a smaller one")
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


def ntk_stage(args, model, task):
    """Table 2: the kernel of the model as it is, printed; P and F go to ntk.npz."""
    print()
    picked = pick_ntk_samples(args.ntk, args.seed, {name: split.labels for name, split in task.splits.items()}, task.labels)
    batches, places, labels = [], [], []
    for name, indices in picked.items():
        split = task.splits[name]
        order = evaluation_batches(split.lengths[indices], 16)  # by length: little padding
        batches.append([split.batch(indices[part])[0] for part in order])
        places.append(np.concatenate(order).argsort())  # where each sample is in the batches
        labels.append(split.labels[indices])
    with devices.memory_advice("--ntk or --max-length"):
        kernels = vars(ntk.empirical_ntk(model.eval(), *batches))
    # back to the random order, in which kernel regression deals its folds
    kernels = {name: kernel[places[name.startswith("test")]][:, :, places[0]] for name, kernel in kernels.items()}
    P, F, test_P, test_F = kernels.values()  # (N, C, N, C), twice; (M, C, N, C), twice
    with torch.no_grad():
        logits = torch.cat([model(**devices.to_device(batch, model.head.weight.device)).cpu() for batch in batches[0]])
    deltas = ntk.initial_deltas(logits[places[0]], labels[0])  # (N, C)
    result = {"train_samples": len(labels[0]), "test_samples": len(labels[1]), "test_split": [*picked][1],
              "ft_ratio": ntk.ft_ratio(ntk.NTK(P, F), deltas)}
    print(f"\n{'kernel':8s}{'rank':>6s}{'Frobenius':>12s}{'train':>9s}{'test':>8s}"
          f"{'train/logit':>13s}{'test/logit':>12s}{'FT ratio':>10s}")
    for name, kernel, test_kernel in (("P", P, test_P), ("F", F, test_F), ("Theta", P + F, test_P + test_F)):
        row = ntk.kernel_statistics(kernel)
        row.pop("trace_norms")
        row |= ntk.kernel_regression(kernel, labels[0], test_kernel, labels[1])
        result[name] = row | {"singular_values": row["singular_values"].tolist()}
        print(f"{name:8s}{row['rank']:6d}{row['frobenius']:12.1f}{row['train_accuracy']:9.3f}"
              f"{row['test_accuracy']:8.3f}{row['train_logit_accuracy']:13.3f}"
              f"{row['test_logit_accuracy']:12.3f}" + f"{result['ft_ratio']:10.3f}" * (name == "F"))
    print(f"train, test: class accuracy of kernel regression, tested on {result['test_split']}; /logit: of its "
          "single yes-or-no decisions")
    files.write_arrays(args.out / "ntk.npz", **kernels, deltas=deltas, labels=labels[0], test_labels=labels[1],
                            train_indices=picked["train"], test_indices=picked[result["test_split"]])
    return result


def ft_stage(args, model, tokenizer, task, state, lines):
    """The FT stage, on all of the encoder or on LoRA alone, and always on the head; the number of the kept epoch."""
    trainable, total = count_parameters(model)
    what = f"LoRA (r = {args.lora_r}) on query and value" if args.lora else "the whole encoder"
    print(f"\nFT    trains {what}, and the head: {trainable:,} of {total:,} parameters "
          f"({100 * trainable / total:.3g} %)\n"
          "FT    epoch 0 is the start, without dropout; then loss and train are means over the epoch, with it")

    def on_epoch(record):
        tqdm.write(f"FT    epoch {record['epoch']:2d}  loss {record['loss']:.4f}  "
                   f"train {record['train_accuracy']:.3f}  {val_title(task)} {record[f'val_{task.metric}']:.3f}  "
                   f"head norm {record['head_norm']:.3f}", file=sys.stdout)
        lines.append({"stage": "ft"} | record)
        files.write_lines(args.out / "metrics.jsonl", lines)

    for record in state.saved.get("history", []):  # of a run that is resumed
        on_epoch(record)
    try:
        with devices.memory_advice("--batch-size or --max-length"):
            history = fine_tune(model, task.splits["train"], task.splits["val"], lr=args.lr, epochs=args.epochs, state=state,
                                batch_size=args.batch_size, seed=args.seed, on_epoch=on_epoch, metric=task.metric)
    except NotFinite as error:
        if error.kept:
            export.save_classifier(args.out, model, tokenizer, task, 1.0, args.max_length, args.data,
                                   "training ended before its last epoch")
        raise ValueError(f"{error}" + f"; the best weights before are in {args.out}" * error.kept) from None
    kept = best_epoch(history, task.metric)["epoch"]
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


def print_configuration(args, task):
    print("configuration")
    for name, value in flags.configuration(args).items():
        if value is not False:  # a flag like --lora is there or not
            shown = "" if value is True else f"{value}   ({args.why_device})" if name == "device" else value
            print(f"  --{name.replace('_', '-'):16s}{shown}".rstrip())
    sizes = ", ".join(f"{name} {len(split)}" for name, split in task.splits.items())
    print(f"  samples           {sizes}\n  classes           {', '.join(task.labels)}")
    if task.skipped:
        counts = ", ".join(f"{name} {count}" for name, count in task.skipped.items())
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


def main(argv=None):
    args = parse_args(argv)

    def work():
        with run_folder.open_run(args) as state:
            if state:
                run(args, state)

    return flags.exit_status("train.py", work, lambda: run_folder.how_to_go_on(args.out))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's way to say Ctrl-C
    sys.exit(main())
