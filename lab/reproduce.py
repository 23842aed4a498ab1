"""The paper's tables and claims, from many runs of train.py.

    python -m lab.reproduce                                              the embedded benchmark
    python -m lab.reproduce --data cb --model path/to/checkpoint --seeds 3

1. tunes learning rates on validation accuracy, with seeds of their own (tuning_runs, choose_rates);
2. runs LP, FT, LoRA, LP-FT and LP-LoRA on every seed, the kernel at the start of each FT stage, and FT and
   LP-FT from scaled heads (main_runs, scale_runs);
3. writes report.md and report.html: every table and figure, and a verdict on each of the paper's claims.

A run is a process of train.py with one thread and a folder of its own, `--jobs` of them go side by side. A run
that is finished is never repeated, one that was interrupted goes on: the same command does what is left. A run
that fails is named, and the others go on. Exit status: 0 done, 2 bad input, 1 a run failed, 130 interrupted.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event

import plumbing  # noqa: F401  before torch
import torch
from tqdm import tqdm

import train
from data import draw_ntk_samples, load_task, read_task, tiny
from lab.report import write_report
from lab.runs import METHODS, PLAN, choose_rates, last_error, read_plan, read_results
from plumbing.checkpoint import load_pretrained
from plumbing.files import read_json, write_text
from plumbing.flags import Failed, Parser, check_task, configuration, exit_status
from plumbing.run_folder import lock_folder

TUNING_SEEDS = (101, 102)
SCALES = (0.1, 0.5, 1, 2, 5, 10, 50, 100)  # of the head, Fig. 3
RATE_FACTORS = (1 / 3, 1, 3)  # of train.py's learning rate


def parse_args(argv=None):
    parser = Parser("lab.reproduce", description="Regenerate the paper's tables and judge its claims.")
    handed = parser.add_argument_group("handed to train.py, whose --help says more")
    handed.add_argument("--data", default="tiny", help="a task by name, or a folder (default: %(default)s)")
    handed.add_argument("--data-dir", type=Path, help="where the paper's data sets lie")
    handed.add_argument("--model", default="tiny", help="tiny, a folder, or a name on the hub (default: %(default)s)")
    handed.add_argument("--max-train", type=int, metavar="N", help="training samples, drawn by seed (default: all)")
    handed.add_argument("--max-test", type=int, metavar="N", help="samples of each test split (default: all)")
    handed.add_argument("--max-length", type=int, metavar="L", help="tokens at which texts are cut (default: 128)")
    handed.add_argument("--epochs", type=int, metavar="N", help="of the FT stage (default: 10)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="runs with seeds 1 to N (default: 5)")
    parser.add_argument("--ntk", type=int, default=100, metavar="N", help="samples of the kernel, 0 for none (default: 100)")
    parser.add_argument("--rates", type=float, nargs="+", metavar="F",
                        help="factors on train.py's learning rates that tuning tries; give more where the "
                             "report says that a rate is at the edge (default: 1/3 1 3)")
    parser.add_argument("--no-tuning", action="store_true", help="keep train.py's learning rates")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, metavar="S",
                        help="factors on the head that FT and LP-FT start from, of claim 6; 1 alone leaves "
                             f"it unmeasured (default: {' '.join(f'{scale:g}' for scale in SCALES)})")
    jobs = 1 if torch.cuda.is_available() else max(1, (os.cpu_count() or 1) // 2)
    parser.add_argument("--jobs", type=int, default=jobs, metavar="N",
                        help="processes side by side (default: half the processors; 1 with a GPU)")
    parser.add_argument("--out", type=Path, help="folder of everything (default: reproduction/DATA-MODEL)")
    args = parser.parse_args(argv)
    for flag, value, least, most in (("--seeds", args.seeds, 2, TUNING_SEEDS[0] - 1), ("--jobs", args.jobs, 1, 1000),
                                     ("--ntk", args.ntk, 0, 250), ("--max-test", args.max_test, 1, 1e15)):
        if value is not None and not least <= value <= most:
            parser.error(f"{flag} is {value}; expected {least} to {most:g}")
    if args.no_tuning and args.rates:
        parser.error("--rates has no effect: --no-tuning keeps train.py's learning rates")
    args.rates = args.rates or RATE_FACTORS
    for flag, factors in (("--scales", args.scales), ("--rates", args.rates)):
        if not all(0 < factor < 1e15 for factor in factors):
            parser.error(f"{flag} are {' '.join(f'{factor:g}' for factor in factors)}; expected numbers above 0")
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
        for factor in args.rates if name != "LP" else ():
            rate = default_rate(args, name) * factor
            for seed in TUNING_SEEDS:
                flags = [*common_flags(args, name, seed), "--lr", f"{rate:.1e}", "--max-test", "0"]
                runs[f"tune-{name}={rate:.1e}-seed{seed}"] = flags
    return runs


def main_runs(args, rates):
    """{name: flags}: every method and seed."""
    runs = {}
    for name in METHODS:
        stage = ["--ntk", str(args.ntk)] if args.ntk and name != "LP" else []
        stage += ["--lr", rates[name]] if name in rates else []
        for seed in range(1, args.seeds + 1):
            runs[f"{name}-seed{seed}"] = [*common_flags(args, name, seed), *stage]
    return runs


def scale_runs(args, rates):
    """{name: flags}: FT and LP-FT from heads times --scales; times 1 they are among main_runs."""
    runs = {}
    for name in ("FT", "LP-FT"):
        rate = ["--lr", rates[name]] if name in rates else []
        for scale in sorted({f"{scale:g}" for scale in args.scales} - {"1"}, key=float):
            for seed in range(1, args.seeds + 1):
                flags = [*common_flags(args, name, seed), *rate, "--head-scale", scale]
                runs[f"{name}-scale{scale}-seed{seed}"] = flags
    return runs


def refuse_other_flags(args, runs):
    """ValueError if a run of that name was made or begun with other flags."""
    for name, flags in runs.items():
        path = args.out / "runs" / name / "config.json"
        before = read_json(path) if path.is_file() else {}
        now = configuration(train.parse_args(flags))
        for key in sorted((before.keys() | now) - {"threads", "versions", "out", "device"} if before else ()):
            if before.get(key) != now.get(key):
                raise ValueError(f"{path.parent}: was made with --{key.replace('_', '-')} {before.get(key)}; now it "
                                 f"would be with {now.get(key)}; choose another --out")


def run_all(args, runs, title="runs"):
    """Run what is not finished, `--jobs` at a time; returns {name: why} of the runs that failed."""
    todo = [name for name in runs if not (args.out / "runs" / name / "result.json").is_file()]
    processes, stopping, failed = set(), Event(), {}
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(runs), initial=len(runs) - len(todo), desc=title,
                                                     unit="run") as bar:
        try:
            futures = {pool.submit(run_one, args, name, runs[name], processes, stopping): name for name in todo}
            for future in as_completed(futures):
                bar.update()
                if why := future.result():
                    failed[futures[future]] = why
                    tqdm.write(f"{futures[future]} failed: {why}")
        finally:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(processes):  # train.py stops; its last whole epoch is saved
                process.terminate()
    return failed


def run_one(args, name, flags, processes, stopping):
    """Run train.py, or go on with what was interrupted; returns why it failed, or None."""
    folder, log = args.out / "runs" / name, args.out / "runs" / f"{name}.log"
    while folder.is_dir() and not stopping.is_set():  # wait for a process that outlived a killed lab.reproduce
        try:
            lock_folder(folder).release()
            break
        except ValueError:
            time.sleep(0.5)
    if stopping.is_set():
        return "interrupted"
    how = ["--resume", folder] if (folder / "config.json").is_file() else [*flags, "--out", folder]
    with open(log, "wb") as said:
        process = subprocess.Popen([sys.executable, Path(train.__file__), *how], stdout=said,
                                   stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        processes.add(process)
        if stopping.is_set():  # between the two lines above
            process.terminate()
        status = process.wait()
        processes.discard(process)
    return f"{last_error(log) or f'status {status}'} (all it said: {log})" if status else None


# ---------------------------------------------------------------------------- the command


def check_data(args):
    """ValueError or OSError now for what the runs would refuse after hours; also fetches or makes the
    encoder.
    """
    rows = read_task(args.data, args.data_dir)
    if "test" not in rows.splits:
        raise ValueError(f"--data {args.data}: has no test split, which tables and claims are about")
    encoder, tokenizer = load_pretrained(tiny.ENCODER if args.model == "tiny" else args.model)
    flags, task = train.parse_args(common_flags(args, "LP-LoRA", seed=1)), None
    for seed in (*range(1, args.seeds + 1), *(() if args.no_tuning else TUNING_SEEDS)):
        if args.max_train or not task:  # else it is the same for every seed
            task = load_task(rows, tokenizer, flags.max_length, None, args.max_train, seed, args.max_test)
        if args.ntk and seed not in TUNING_SEEDS:
            draw_ntk_samples(args.ntk, seed, task)
    check_task(flags, task, tokenizer, encoder.config)


def reproduce(args, command):
    """Tuning, all other runs, the report; Failed if a run failed."""
    for flags in main_runs(args, {}).values():  # a flag that train.py refuses ends here, not after an hour
        train.parse_args(flags)
    if args.out.is_dir() and any(args.out.iterdir()) and not (args.out / "runs").is_dir():
        raise ValueError(f"--out {args.out}: holds something else; expected a new folder or an earlier one")
    check_data(args)
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    lock = lock_folder(args.out)
    try:
        tuning, rates, failed = {} if args.no_tuning else tuning_runs(args), {}, {}
        refuse_other_flags(args, tuning)
        earlier = read_plan(args.out) if (args.out / PLAN).is_file() else {"tuning": None}
        if earlier["tuning"] == tuning:  # a choice is made once, even if a run that failed would now succeed
            rates = earlier["rates"]
        elif tuning:  # a rate at which a run fails is no choice, and no reason to stop
            failed = run_all(args, tuning, "tuning")
            rates = choose_rates(read_results(args.out, tuning), tuning)
        runs = main_runs(args, rates) | scale_runs(args, rates)
        refuse_other_flags(args, runs)
        plan = {"command": command, "seeds": args.seeds, "rates": rates, "tuning": tuning, "runs": runs}
        write_text(args.out / PLAN, json.dumps(plan, indent=1) + "\n")
        failed |= run_all(args, runs)
        if failed:
            print("\n".join(f"  {name}: {why}" for name, why in failed.items()), file=sys.stderr)
        try:
            write_report(args.out)
        except ValueError as error:
            if not failed:
                raise
            print(f"no report: {error}", file=sys.stderr)
    finally:
        lock.release()
    if failed:
        raise Failed(f"{len(failed)} runs failed; the same command tries them again, except for tuning")


def main(argv=None):
    args = parse_args(argv)
    command = shlex.join(["python", "-m", "lab.reproduce", *(sys.argv[1:] if argv is None else argv)])
    return exit_status("lab.reproduce", lambda: reproduce(args, command), lambda: "; the same command goes on")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
