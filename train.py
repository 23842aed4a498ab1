"""Train a text classifier with LP, FT or LP-FT, with or without LoRA, and say what happened.

    python train.py --method lpft --lora                          the embedded benchmark, seconds
    python train.py --method ft --model roberta-base --data cb    a real encoder, real data

Read `run` first: one run in the order of the paper. The stages that it calls are below; the method is in
lpft.py, the kernel in ntk.py, batches in data/; files, flags and devices are in plumbing/.

`python train.py --resume RUN_DIR` goes on after an interrupted run's last whole epoch, to the same numbers.
Exit status: 0 done, 2 bad input or infinite loss, 1 full disk or memory or a solver that failed, 130 stopped.
"""

import plumbing  # noqa: F401  before torch
import torch

import ntk
from data import draw_ntk_samples, load_task, read_task
from lpft import (METRICS, NotFinite, accuracy, best_epoch, calibration_error, feature_statistics, fine_tune,
                  fit_linear_probe, fit_temperature, logits_of, predict, set_head, why_no_temperature)
from model import Classifier, add_lora, count_parameters
from plumbing import checkpoint, devices, export, files, flags, run_folder


def parse_args(argv=None):
    """The flags, with every default filled in; meaningless ones end in one line and status 2."""
    parser = flags.Parser("train.py", description="Train a text classifier: train.py --method lpft --lora")
    add = parser.add_argument_group("method, model and task").add_argument
    add("--method", choices=("lp", "ft", "lpft"), default="lpft", help="lp, linear probing: fit the head on "
        "frozen features; ft, fine-tuning: all from a random head; lpft: ft from lp's head (default: lpft)")
    add("--lora", action="store_true", help="in the FT stage train low-rank updates of the query and value "
        "projections instead of the whole encoder")
    add("--lora-r", type=int, metavar="R", help="rank of the updates (default: 8)")
    add("--lora-alpha", type=float, metavar="A", help="updates are scaled by A / R (default: 8)")
    add("--lp-scoring", choices=("accuracy", "log-loss"), help="what LP's cross-validation maximises "
        "(default: accuracy; on tiny, tiny-30, ... minus log-loss)")
    add("--lp-inverse-l2", type=float, metavar="C", help="fix LP's penalty (scikit-learn's C)")
    add("--model", default="tiny", metavar="{tiny,DIR,HUB}", help="tiny: the one in data/tiny_encoder; or "
        "a folder with a BERT or RoBERTa checkpoint; or its name on the Hugging Face hub (default: tiny)")
    add("--data", default="tiny", metavar="NAME|DIR", help=f"{', '.join(flags.tiny.TASKS)}; or one of "
        f"the paper's, {', '.join(flags.CORPORA)}; or a folder with train, maybe val, test, ood_NAME, each "
        ".tsv, .csv or .jsonl with text (or text_a, text_b) and label (default: tiny)")
    add = parser.add_argument_group("FT stage (defaults by method, model and data are printed)").add_argument
    add("--epochs", type=int, metavar="N", help="the best on validation is kept (default: 10)")
    add("--batch-size", type=int, metavar="N", help="samples per step")
    add("--lr", type=float, metavar="LR", help="learning rate at the first step")
    add("--head-scale", type=float, metavar="S", help="multiply the initial head by S (Fig. 3; default: 1)")
    add("--ntk", type=int, nargs="?", const=250, metavar="N", help="before its first step, compute the "
        "neural tangent kernel on N training and N test samples (1 to 250; 250 if no number is given)")
    flags.add_common_flags(parser)
    return flags.read(parser, argv)


# ---------------------------------------------------------------------------- one run


def run(args, state):
    """One run, in the order of the paper; returns the dict that result.json holds."""
    task, encoder, tokenizer = load(args)
    numbers_depend_on = flags.configuration(args, "out", "export")
    state.load(numbers_depend_on | {"data and encoder": run_folder.fingerprint(task, encoder)})
    flags.print_configuration(args, task, encoder)
    torch.manual_seed(args.seed)
    model = Classifier(encoder, len(task.labels)).to(args.device)
    features_0 = features_of(model, task, args)  # phi_0(x), before any weight changes
    result = {name: vars(args)[name] for name in ("method", "lora", "seed", "model", "data")}
    result |= {"samples": {name: len(split) for name, split in task.splits.items()}}
    head_0 = torch.zeros_like(model.head.weight)  # V_0 of LP: its solver starts at 0, not at the random head

    if args.method != "ft":  # LP: the head alone, from the stored phi_0; the encoder is not touched
        result["lp"] = lp_stage(args, model, task, features_0)
    if args.method != "lp":  # the FT stage, from the random head or from LP's
        for parameter in model.head.parameters():  # V and b
            parameter.data *= args.head_scale or 1.0
        head_0 = model.head.weight.detach().clone()  # V_0, where the FT stage starts
        if args.lora:
            add_lora(model.encoder, args.lora_r, args.lora_alpha)  # the rest of the encoder is frozen
        if args.ntk:  # Theta = P + F, where the FT stage starts
            result["ntk"] = ntk_stage(args, model, task)
        result["kept_epoch"] = ft_stage(args, model, tokenizer, task, state, result.get("lp"))
    else:
        model.encoder.requires_grad_(False)  # to count parameters: the head alone has trained

    result |= evaluate(model, task, features_0, frozen=args.method == "lp")
    trainable, total = count_parameters(model)
    result |= {"head_norm_initial": float(head_0.norm()), "trainable_parameters": trainable,
               "head_diff": float((model.head.weight.detach() - head_0).norm()), "total_parameters": total,
               "seconds": round(state.seconds(), 2)}
    export.save_run(args, model, tokenizer, task, result)
    print_table(args, result)
    return result


def load(args):
    """(Task, Encoder, Tokenizer); ValueError for data, encoder and flags that do not fit each other."""
    rows = read_task(args.data, args.data_dir, args.language)  # bad data end before a long download
    encoder, tokenizer = checkpoint.load_pretrained(args.model, args.pooling)
    task = load_task(rows, tokenizer, args.max_length, max_train=args.max_train, seed=args.seed,
                     max_test=args.max_test)
    flags.check_task(args, task, tokenizer, encoder.config)
    return task, encoder, tokenizer


def features_of(model, task, args):
    """{split: phi_0, (N, h)}; without LP, train and val need none."""
    features_0 = {name: predict(model, task.splits[name], desc=f"features of {name}")[0]
                  for name in (task.test_names if args.method == "ft" else task.splits)}
    if not all(torch.isfinite(features).all() for features in features_0.values()):
        raise ValueError(f"--model {args.model}: features with NaN or infinity; the checkpoint is damaged")
    return features_0


def lp_stage(args, model, task, features_0):
    """Linear probing: fit the head on phi_0 of the training split and put it in the model."""
    labels, val_labels = task.splits["train"].labels, task.splits["val"].labels
    size, (_, total) = model.head.weight.numel() + model.head.bias.numel(), count_parameters(model)
    print(f"\nLP    trains the head alone, on {len(labels)} fixed features: {size:,} of {total:,} "
          f"parameters ({100 * size / total:.3g} %)")
    probe = fit_linear_probe(features_0["train"], labels, len(task.labels), args.lp_inverse_l2,
                             args.lp_scoring)
    set_head(model, probe)
    logits, val_logits = (logits_of(model, features_0[name]) for name in ("train", "val"))  # (N, C)
    record = {"stage": "lp", "inverse_l2": probe.inverse_l2, "train_accuracy": accuracy(logits, labels),
              "val_accuracy": accuracy(val_logits, val_labels),
              f"val_{task.metric}": METRICS[task.metric](val_logits, val_labels),
              "head_norm": float(probe.weight.norm()), "path": probe.path}
    chosen = "fixed" if args.lp_inverse_l2 else f"chosen by 5-fold {args.lp_scoring}"
    print(f"LP    inverse_l2 {probe.inverse_l2:.4g}, {chosen};  train {record['train_accuracy']:.3f}  "
          f"val {task.metric} {record[f'val_{task.metric}']:.3f}  head norm {record['head_norm']:.3f}")
    if args.lp_scoring == "accuracy" and (probe.scores == probe.scores.max()).sum() > 1:
        print("LP    weaker penalties score the same; --lp-scoring log-loss may tell them apart")
    if args.lp_scoring == "accuracy" and record["train_accuracy"] > record["val_accuracy"] + 0.2:
        print("LP    train is far above val: the head overfits; try --lp-scoring log-loss")
    files.write_lines(args.out / "metrics.jsonl", [record])
    return record


def ntk_stage(args, model, task):
    """Table 2: the kernel of the model as it is, printed; ntk.npz has P (pretrain) and F (ft)."""
    print()
    picked = draw_ntk_samples(args.ntk, args.seed, task)
    labels, test_labels = (task.splits[name].labels[indices] for name, indices in picked.items())
    (train, place), (test, test_place) = (task.splits[name].batches(indices, 16)
                                          for name, indices in picked.items())
    kernel = ntk.empirical_ntk(model.eval(), train, test)
    # in the order of `picked`, not of the batches: the folds of kernel regression depend on it
    P, F = (part[place][:, :, place] for part in (kernel.pretrain, kernel.ft))  # (N, C, N, C)
    test_P, test_F = (part[test_place][:, :, place] for part in (kernel.test_pretrain, kernel.test_ft))
    with torch.no_grad():
        logits = torch.cat([model(**b).cpu() for b in devices.all_to_device(train, model)])  # (N, C)
    deltas = ntk.initial_deltas(logits[place], labels)
    result = {"train_samples": len(labels), "test_samples": len(test_labels), "test_split": [*picked][1],
              "ft_ratio": ntk.ft_ratio(ntk.NTK(P, F), deltas)}
    print(f"\n{'kernel':8s}{'rank':>6s}{'Frobenius':>12s}{'train':>9s}{'test':>8s}"
          f"{'train/logit':>13s}{'test/logit':>12s}{'FT ratio':>10s}")
    for name, part, test_part in (("P", P, test_P), ("F", F, test_F), ("Theta", P + F, test_P + test_F)):
        row = ntk.kernel_statistics(part) | ntk.kernel_regression(part, labels, test_part, test_labels)
        row["singular_values"] = row["singular_values"].tolist()
        result[name] = row
        print(f"{name:8s}{row['rank']:6d}{row['frobenius']:12.1f}{row['train_accuracy']:9.3f}"
              f"{row['test_accuracy']:8.3f}{row['train_logit_accuracy']:13.3f}"
              f"{row['test_logit_accuracy']:12.3f}" + f"{result['ft_ratio']:10.3f}" * (name == "F"))
    print(f"train, test: class accuracy of kernel regression, tested on {result['test_split']}; /logit: of "
          "its single yes-or-no decisions")
    files.write_arrays(args.out / "ntk.npz", pretrain=P, ft=F, test_pretrain=test_P, test_ft=test_F,
                       labels=labels, test_labels=test_labels, deltas=deltas, train_indices=picked["train"],
                       test_indices=picked[result["test_split"]])
    return result


def ft_stage(args, model, tokenizer, task, state, lp_record):
    """The FT stage, on all of the encoder or on LoRA alone, and on the head: the epoch that is kept."""
    trainable, total = count_parameters(model)
    what = f"LoRA (r = {args.lora_r}) on query and value" if args.lora else "the whole encoder"
    print(f"\nFT    trains {what}, and the head: {trainable:,} of {total:,} parameters "
          f"({100 * trainable / total:.3g} %)\n"
          "FT    epoch 0 is the start, without dropout; later loss and train are means with dropout")
    lines = [lp_record] if lp_record else []

    def on_epoch(record):
        print(f"FT    epoch {record['epoch']:2d}  loss {record['loss']:.4f}  "
              f"train {record['train_accuracy']:.3f}  val {task.metric} {record[f'val_{task.metric}']:.3f}  "
              f"head norm {record['head_norm']:.3f}", flush=True)
        lines.append({"stage": "ft"} | record)
        files.write_lines(args.out / "metrics.jsonl", lines)

    for record in state.saved.get("history", []):  # of a run that is resumed
        on_epoch(record)
    try:
        history = fine_tune(model, task.splits["train"], task.splits["val"], lr=args.lr, seed=args.seed,
                            batch_size=args.batch_size, epochs=args.epochs, metric=task.metric,
                            on_epoch=on_epoch, state=state)
    except NotFinite as error:
        kept = export.save_unfinished(args, model, tokenizer, task, error)
        raise ValueError(f"{error}{kept}") from None
    kept = best_epoch(history, task.metric)["epoch"]
    print(f"FT    keeps epoch {kept}, the first after the start with the highest validation {task.metric}")
    return kept


def evaluate(model, task, features_0, frozen=False):
    """Accuracy, features, calibration on every test split; T is from val. frozen: phi is features_0 still."""
    saved, score = {}, METRICS[task.metric]  # accuracy is reported beside any other

    def outcome(name):  # features (N, h), logits (N, C), labels (N,)
        features, logits = (features_0[name], logits_of(model, features_0[name])) if frozen else predict(
            model, task.splits[name], desc=f"testing on {name}")
        saved.update({f"logits_{name}": logits, f"labels_{name}": task.splits[name].labels})
        return features, logits, task.splits[name].labels

    _, logits, labels = outcome("val")
    temperature, reason = fit_temperature(logits, labels), why_no_temperature(logits, labels)
    result = {"metric": task.metric, "val_accuracy": accuracy(logits, labels), f"val_{task.metric}":
              score(logits, labels), "temperature": temperature, "temperature_reason": reason, "accuracy": {},
              "head_norm": float(model.head.weight.detach().norm()), task.metric: {}, "features": {},
              "features_pretrained": {}, "calibration": {}}
    for name in task.test_names:
        features, logits, labels = outcome(name)
        result["accuracy"][name] = accuracy(logits, labels)
        result[task.metric][name] = score(logits, labels)
        result["features"][name] = feature_statistics(features, features_0[name], labels)
        result["features_pretrained"][name] = feature_statistics(features_0[name], features_0[name], labels)
        before, after = (calibration_error(logits / T, labels) for T in (1, temperature))  # (ECE, MCE)
        result["calibration"][name] = {"ece": before[0], "ece_scaled": after[0],
                                       "mce": before[1], "mce_scaled": after[1]}  # in the order of the table
    return result | {"logits": saved}


def print_table(args, result):
    """The final table, then one line that a script can parse."""
    scores = list(dict.fromkeys((result["metric"], "accuracy")))
    titles = [*scores, "ECE", "ECE/T", "MCE", "MCE/T", "CS(F)", "Diff(F)", "FDR(F)", "Norm(F)"]
    head = " " * 12 + "".join(f"{title:>9s}" for title in titles)
    print("\n" + (head if result["accuracy"] else "no test split: only validation accuracy is known"))
    for name in result["accuracy"]:
        numbers = [result[score][name] for score in scores] + [*result["calibration"][name].values()]
        numbers += result["features"][name].values()
        print(f"{name[:11]:12s}" + "".join(f"{x:9.3f}" if x < 1e4 else f"{x:9.1e}" for x in numbers))
    with_t = f"after dividing logits by T = {result['temperature']:.4g}, fitted on validation"
    if result["temperature_reason"]:
        with_t = f"with T = 1, not fitted: {result['temperature_reason']}"
    legend = f"ECE/T, MCE/T: {with_t}. Diff(F): from the pre-trained encoder." if result["accuracy"] else (
        f"predict.py gives probabilities {with_t}.")
    print(f"\n{legend}\nHead norm {result['head_norm_initial']:.3f} -> {result['head_norm']:.3f}.  "
          f"Everything is in {args.out}" + f", for other tools in {args.export}" * bool(args.export) + ".\n")
    line = {"method": args.method + "-lora" * args.lora, "data": args.data, "seed": args.seed}
    for score in reversed(scores):  # accuracy first
        line |= {f"{split}_{score}": f"{value:.4f}"
                 for split, value in ({"val": result[f"val_{score}"]} | result[score]).items()}
    line |= {key: f"{result[key]:.4f}" for key in ("head_norm", "temperature", "seconds")}
    print("result: " + " ".join(f"{key}={value}" for key, value in line.items()))


def main(argv=None):
    args = parse_args(argv)
    return flags.exit_status("train.py", lambda: run_folder.run_in_folder(args, run),
                             lambda: run_folder.how_to_go_on(args.out))


if __name__ == "__main__":
    flags.run_main(main)
