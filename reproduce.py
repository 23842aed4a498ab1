"""The paper's tables and claims, from many runs of train.py.

    python reproduce.py                                              the embedded benchmark
    python reproduce.py --data cb --model path/to/checkpoint --seeds 3

1. tunes learning rates on validation accuracy, with seeds of their own (tuning_runs, choose_rates);
2. runs LP, FT, LoRA, LP-FT and LP-LoRA on every seed, the kernel at the start of each FT stage, and FT and
   LP-FT from scaled heads (main_runs, scale_runs);
3. writes report.md and report.html: every table and figure, and a verdict on each of the paper's seven
   claims (report.py, figures.py, which also run alone).

A run is a process of train.py with one thread, and `--jobs` of them go side by side. A finished run is
never repeated: after an interruption the same command goes on.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import train
from report import METHODS, choose_rates, read_results, write_report
from resume import lock_folder, status_of, write_text

TUNING_SEEDS = (101, 102)
SCALES = (0.1, 0.5, 1, 2, 5, 10, 50, 100)  # of the head, Fig. 3
RATE_FACTORS = (1 / 3, 1, 3)  # of train.py's learning rate


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Regenerate the paper's tables and judge its claims.")
    handed = parser.add_argument_group("handed to train.py, whose --help says more")
    handed.add_argument("--data", default="tiny", help="a task by name, or a folder (default: %(default)s)")
    handed.add_argument("--data-dir", type=Path, help="where the paper's data sets lie")
    handed.add_argument("--model", default="tiny", help="tiny, a folder, or a name on the hub (default: %(default)s)")
    handed.add_argument("--max-train", type=int, metavar="N", help="training samples, drawn by seed (default: all)")
    handed.add_argument("--max-test", type=int, metavar="N", help="samples of each test split (default: all)")
    handed.add_argument("--max-length", type=int, metavar="L", help="tokens at which texts are cut (default: 128)")
    handed.add_argument("--epochs", type=int, metavar="N", help="of the FT stage (default: 10)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="runs with seeds 1 to N (default: 5)")
    parser.add_argument("--ntk", type=int, default=100, metavar="N", help="samples of the kernel (default: 100)")
    parser.add_argument("--no-tuning", action="store_true", help="keep train.py's learning rates")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, metavar="S",
                        help="factors on the head that FT and LP-FT start from, of claim 6; 1 alone leaves it "
                             f"unmeasured (default: {' '.join(f'{scale:g}' for scale in SCALES)})")
    jobs = 1 if torch.cuda.is_available() else max(1, (os.cpu_count() or 1) // 2)
    parser.add_argument("--jobs", type=int, default=jobs, metavar="N",
                        help="processes side by side (default: half the processors; 1 with a GPU)")
    parser.add_argument("--out", type=Path, help="folder of everything (default: reproduction/DATA-MODEL)")
    parser.error = lambda message: parser.exit(2, f"reproduce.py: error: {message}\n")
    args = parser.parse_args(argv)
    for flag, value, least in (("--seeds", args.seeds, 2), ("--jobs", args.jobs, 1), ("--ntk", args.ntk, 1),
                               ("--max-test", args.max_test, 1)):
        if value is not None and value < least:
            parser.error(f"{flag} is {value}; expected {least} or more")
    if not all(0 < scale < 1e15 for scale in args.scales):
        parser.error(f"--scales are {' '.join(f'{scale:g}' for scale in args.scales)}; expected numbers above 0")
    args.out = args.out or Path("reproduction") / f"{Path(args.data).name}-{Path(args.model).name}"
    return args


# ---------------------------------------------------------------------------- the runs


def common_flags(args, name, seed):
    """The flags of train.py of one run of a method."""
    method, lora = METHODS[name]
    flags = ["--method", method, *["--lora"] * lora, "--data", args.data, "--model", args.model, "--seed", str(seed)]
    for flag in ("data_dir", "max_train", "max_test", "max_length"):
        if getattr(args, flag) is not None:
            flags += ["--" + flag.replace("_", "-"), str(getattr(args, flag))]
    if args.epochs is not None and method != "lp":
        flags += ["--epochs", str(args.epochs)]
    return flags


def default_rate(args, name):
    return train.parse_args(common_flags(args, name, 0)).lr


def tuning_runs(args):
    """{name: flags}: every method with an FT stage, rate and tuning seed, test and OOD splits left alone."""
    runs = {}
    for name in METHODS:
        for factor in RATE_FACTORS if name != "LP" else ():
            rate = default_rate(args, name) * factor
            for seed in TUNING_SEEDS:
                flags = [*common_flags(args, name, seed), "--lr", f"{rate:.1e}", "--max-test", "0"]
                runs[f"tune-{name}={rate:.1e}-seed{seed}"] = flags
    return runs


def main_runs(args, rates):
    """{name: flags}: every method and seed."""
    runs = {}
    for name in METHODS:
        stage = [] if name == "LP" else ["--ntk", str(args.ntk)]
        stage += ["--lr", rates[name]] if name in rates else []
        for seed in range(1, args.seeds + 1):
            runs[f"{name}-seed{seed}"] = [*common_flags(args, name, seed), *stage]
    return runs


def scale_runs(args, rates):
    """{name: flags}: FT and LP-FT from heads times --scales; times 1 they are among main_runs."""
    runs = {}
    for name in ("FT", "LP-FT"):
        rate = ["--lr", rates[name]] if name in rates else []
        for scale in sorted(set(args.scales) - {1}):
            for seed in range(1, args.seeds + 1):
                flags = [*common_flags(args, name, seed), *rate, "--head-scale", f"{scale:g}"]
                runs[f"{name}-scale{scale:g}-seed{seed}"] = flags
    return runs


def run_all(args, runs):
    """Run what is not finished, `--jobs` at a time; RuntimeError names the log of a run that failed."""
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    todo = [name for name in runs if not (args.out / "runs" / name / "flags.json").is_file()]
    for name in runs.keys() - set(todo):
        found = json.loads((args.out / "runs" / name / "flags.json").read_text(encoding="utf-8"))
        if found != runs[name]:
            raise ValueError(f"{args.out / 'runs' / name}: was made with {' '.join(found)}; now it would be with "
                             f"{' '.join(runs[name])}; choose another --out")
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are there already", flush=True)
    started, running = time.monotonic(), set()

    def run(name):
        folder, partial, begun = (args.out / "runs" / f"{name}{end}" for end in ("", ".partial", ".begun"))
        command = [sys.executable, Path(__file__).with_name("train.py")]
        if (partial / "config.json").is_file() and begun.is_file() and json.loads(begun.read_text()) == runs[name]:
            command += ["--resume", partial]  # of an interruption; its lock says if it is still running
        else:
            if partial.is_dir():
                lock_folder(partial).release()  # ValueError if it is
            shutil.rmtree(partial, ignore_errors=True)
            write_text(begun, json.dumps(runs[name]))
            command += [*runs[name], "--out", partial]
        with open(args.out / "runs" / f"{name}.log", "a", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                       env=os.environ | {"OMP_NUM_THREADS": "1"})
            running.add(process)
            status = process.wait()
            running.discard(process)
        if status:
            words = Path(log.name).read_text(encoding="utf-8", errors="replace").split() or ["none"]
            raise RuntimeError(f"{name} ended with status {status}; its last words are in {log.name}: "
                               f"... {' '.join(words[-40:])}")
        write_text(partial / "flags.json", json.dumps(runs[name]) + "\n")
        partial.rename(folder)
        begun.unlink()
        return name

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for count, name in enumerate(pool.map(run, todo), 1):
                result = json.loads((args.out / "runs" / name / "result.json").read_text(encoding="utf-8"))
                scores = {"val": result["val_" + result["metric"]]} | result[result["metric"]]
                print(f"[{count}/{len(todo)}, {time.monotonic() - started:.0f} s] {name}: "
                      + ", ".join(f"{split} {score:.3f}" for split, score in scores.items()), flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):  # they save their state
                process.terminate()


def main(argv=None):
    args = parse_args(argv)
    for flags in main_runs(args, {}).values():  # a flag that train.py refuses ends here, not after an hour
        train.parse_args(flags)
    command = " ".join(["python reproduce.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        if args.out.is_dir() and any(args.out.iterdir()) and not (args.out / "runs").is_dir():
            raise ValueError(f"--out {args.out}: holds something else; expected a new folder or an earlier one")
        (args.out / "runs").mkdir(parents=True, exist_ok=True)
        lock = lock_folder(args.out)  # noqa: F841  held until the process ends
        (args.out / "command.txt").write_text(command + "\n", encoding="utf-8")
        if "tiny" in (args.model, args.data):  # pre-trained once, not in every process
            train.pretrain.tiny_encoder()
        if not args.no_tuning:
            run_all(args, tuning_runs(args))
        tuned = read_results(args.out)[1]
        rates = {} if args.no_tuning else choose_rates({name: tuned[name] for name in tuning_runs(args)})
        run_all(args, main_runs(args, rates) | scale_runs(args, rates))
        write_report(args.out)
        return 0
    except (ValueError, OSError) as error:
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        return status_of(error)
    except RuntimeError as error:
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nreproduce.py: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
