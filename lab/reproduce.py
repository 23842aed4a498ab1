"""The paper's tables and claims, from many runs of train.py.

    python -m lab.reproduce                                              the embedded task, eight languages
    python -m lab.reproduce --data cb --model path/to/checkpoint         real data, three seeds

A plain list of commands, each of which does nothing if its run is finished: encoders of other languages
(lab.pretrain), then learning rates on the validation of two units of their own, then LP, FT, LoRA, LP-FT and
LP-LoRA on every unit, with the kernel, and FT and LP-FT from scaled heads; at the end the report. `--list`
prints what is left of the list, one shell command a line, for other machines; `--report` makes the report of
what is there. Any further flag, such as --max-train 500, goes to train.py, with the methods that it concerns.

A run that fails is named, and the others go on. Exit status: 0 done, 2 bad input, 1 a run failed, 130
interrupted; the same command goes on.
"""

import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from contextlib import redirect_stdout
from multiprocessing import forkserver
from pathlib import Path

import plumbing  # noqa: F401  before torch
import torch
from tqdm import tqdm

import train
from data import tiny
from lab import pretrain
from lab.report import write_report
from lab.runs import METHODS, PLAN, choose_rates, last_error, read_plan, read_results
from plumbing.files import read_json, write_json
from plumbing.flags import Failed, Parser, configuration, exit_status, run_main
from plumbing.run_folder import lock_folder

TUNING_UNITS = (101, 102)
OWN_FLAGS = ("--method", "--lora", "--seed", "--language", "--lr", "--head-scale", "--resume", "--export")
ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv=None, program="lab.reproduce"):
    parser = Parser(program, description="Regenerate the paper's tables and judge its claims. "
                    "Further flags go to train.py.")
    add = parser.add_argument
    add("--data", default="tiny", help="a task by name, or a folder (default: tiny)")
    add("--model", default="tiny", help="a folder or a hub name (default: tiny, an encoder per language)")
    add("--languages", type=int, metavar="N", help="of embedded tasks: languages 0 to N - 1 (default: 8)")
    add("--seeds", type=int, metavar="N", help="units elsewhere: seeds 0 to N - 1 (default: 3)")
    add("--ntk", type=int, default=100, metavar="N", help="samples of the kernel, 0 for none (default: 100)")
    add("--rates", type=float, nargs="+", default=(1 / 3, 1, 3), metavar="F", help="factors on train.py's "
        "learning rates that tuning tries; a single one is taken without tuning (default: 1/3 1 3)")
    add("--scales", type=float, nargs="+", default=(0.1, 0.5, 2, 5, 10, 50, 100), metavar="S", help="factors "
        "on FT's and LP-FT's first head, for claim 6; 1 leaves it out (default: 0.1 0.5 2 5 10 50 100)")
    add("--jobs", type=int, metavar="N", help="processes side by side (default: as many as processors on an "
        "embedded task, else half; 1 with a GPU)")
    add("--out", type=Path, help="folder of everything (default: reproduction/DATA-MODEL)")
    add("--list", action="store_true", help="print the commands that are left, and run none")
    add("--report", action="store_true", help="make the report of what is there, and run nothing")
    args, further = parser.parse_known_args(argv)
    args.further = [part for word in further
                    for part in (word.split("=", 1) if word.startswith("--") else [word])]
    own = {*args.further} & {*OWN_FLAGS}
    if own:
        parser.error(f"{min(own)} has no effect: every run has its own; expected flags like --max-train")
    embedded = args.data in tiny.TASKS
    args.unit, count, usual, other = (("language", args.languages, 8, "seeds") if embedded else
                                      ("seed", args.seeds, 3, "languages"))
    if getattr(args, other) is not None:
        parser.error(f"--{other} has no effect: the units of --data {args.data} are {args.unit}s")
    if embedded and args.model != "tiny":
        parser.error("--model has no effect: every language of an embedded task has an encoder of its own")
    args.units = [*range(usual if count is None else count)]
    if args.jobs is None:  # a tiny encoder takes little memory
        args.jobs = 1 if torch.cuda.is_available() else (os.cpu_count() or 1) // (1 if embedded else 2) or 1
    for flag, value, least, most in ((f"--{args.unit}s", len(args.units), 2, 100),
                                     ("--jobs", args.jobs, 1, 1000), ("--ntk", args.ntk, 0, 250)):
        if not least <= value <= most:
            parser.error(f"{flag} is {value}; expected {least} to {most}")
    for flag, factors in (("--scales", args.scales), ("--rates", args.rates)):
        if not all(0 < factor < 1e15 for factor in factors):
            parser.error(f"{flag} are {' '.join(f'{f:g}' for f in factors)}; expected numbers above 0")
    args.out = args.out or Path("reproduction") / f"{Path(args.data).name}-{Path(args.model).name}"
    return args


# ---------------------------------------------------------------------------- the list


def encoder_of(args, unit):
    """The encoder of a unit; of languages that are not shipped it lies beside --out, for folders to share."""
    folder = os.path.join(args.out.parent, "encoders", str(unit))  # ./encoders/0: without ./ a hub name
    return folder if args.unit == "language" and unit != tiny.LANGUAGE else args.model


def common_flags(args, name, unit):
    """train.py's flags of one run of a method."""
    method, lora = METHODS[name]
    idle = {"lp": {"--epochs", "--batch-size"}, "ft": {"--lp-scoring", "--lp-inverse-l2"}}.get(method, set())
    idle = idle | ({"--lora-r", "--lora-alpha"} if not lora else set())  # would have no effect here
    further = [word for before, word in zip(["", *args.further], args.further) if not {before, word} & idle]
    language = ["--language", str(unit)] if args.unit == "language" else []
    model = ["--model", str(encoder_of(args, unit))]
    return ["--method", method, *["--lora"] * lora, "--data", args.data, *model, *language, "--seed",
            str(unit), *further]


def rates_of(args, name):
    """The learning rates that tuning tries for a method."""
    flags = common_flags(args, name, tiny.LANGUAGE)  # its encoder is there
    return [f"{train.parse_args(flags).lr * factor:.1e}" for factor in args.rates]


def tuning_runs(args):
    """{name: flags}: every method with an FT stage, rate and tuning unit; test and OOD are left alone."""
    return {f"tune-{name}={rate}-{unit}": [*common_flags(args, name, unit), "--lr", rate, "--max-test", "0"]
            for name in METHODS if name != "LP" and len(args.rates) > 1
            for rate in rates_of(args, name) for unit in TUNING_UNITS}


def main_runs(args, rates):
    """{name: flags}: every method and unit; FT and LP-FT from scaled heads too."""
    runs = {}
    for unit in args.units:
        for name in METHODS:
            flags = common_flags(args, name, unit) + (["--lr", rates[name]] if name != "LP" else [])
            runs[f"{name}-{unit}"] = flags + ["--ntk", str(args.ntk)] * (args.ntk > 0 and name != "LP")
            for scale in sorted({f"{scale:g}" for scale in args.scales} - {"1"}, key=float):
                if name in ("FT", "LP-FT"):
                    runs[f"{name}-scale{scale}-{unit}"] = [*flags, "--head-scale", scale]
    return runs


def encoders(args):
    """{name: flags of lab.pretrain} of the languages that have no encoder yet."""
    units = (*TUNING_UNITS[:2 * (len(args.rates) > 1)], *args.units) if args.unit == "language" else ()
    return {f"encoder-{unit}": ["--seed", str(unit), "--out", str(encoder_of(args, unit))]
            for unit in units if unit != tiny.LANGUAGE}


def leaves(args, name, flags):
    """The file that is there once the command has come to its end."""
    if name.startswith("encoder-"):
        return Path(flags[-1], "config.json")
    return args.out / "runs" / name / "result.json"


def shell_line(args, name, flags):
    """For any shell, here or elsewhere: it does what is not done, and goes on with what is begun."""
    done = f"test -e {shlex.quote(str(leaves(args, name, flags)))}"
    if name.startswith("encoder-"):
        path = f'PYTHONPATH={shlex.quote(str(ROOT))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
        return f"{done} || exec env {path} {shlex.join([sys.executable, '-m', 'lab.pretrain', *flags])}"
    folder = args.out / "runs" / name
    begin, resume = (shlex.join(["exec", sys.executable, str(ROOT / "train.py"), *words])
                     for words in ([*flags, "--out", str(folder)], ["--resume", str(folder)]))
    begun = f"test -e {shlex.quote(str(folder / 'config.json'))}"
    return f"export OMP_NUM_THREADS=1; {done} || if {begun}; then {resume}; else {begin}; fi"


def run_all(args, commands, title, jobs=None):
    """Run what is not done, `--jobs` at a time; returns {name: why} of those that failed."""
    waiting = [name for name in commands if not leaves(args, name, commands[name]).exists()]
    for name in waiting:  # ValueError for what outlived a killed lab.reproduce, or runs on another machine
        if (args.out / "runs" / name).is_dir():
            lock_folder(args.out / "runs" / name).release()
    running, failed = {}, {}
    with tqdm(total=len(commands), initial=len(commands) - len(waiting), desc=title, unit="run") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < (jobs or args.jobs):
                    name = waiting.pop(0)
                    if leaves(args, name, commands[name]).exists():  # another process has made it meanwhile
                        bar.update()
                        continue
                    running[name] = start(args, name, commands[name])
                time.sleep(0.02)
                for name in [name for name, process in running.items() if not process.is_alive()]:
                    if status := running.pop(name).exitcode:
                        log = args.out / "runs" / f"{name}.log"
                        failed[name] = f"{last_error(log) or f'status {status}'} (all it said: {log})"
                        tqdm.write(f"{name} failed: {failed[name]}")
                    bar.update()
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.join()
    return failed


def start(args, name, flags):
    """A process that does what its shell line does, but has torch at once: to import it takes longer."""
    os.environ["OMP_NUM_THREADS"] = "1"
    folder, log = args.out / "runs" / name, args.out / "runs" / f"{name}.log"
    log.write_bytes(b"")
    if not name.startswith("encoder-"):
        begun = (folder / "config.json").exists()
        flags = ["--resume", str(folder)] if begun else [*flags, "--out", str(folder)]
    processes = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "forkserver")
    processes.set_forkserver_preload(["train", "lab.pretrain", "lab.report", "torch._dynamo"])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the server too, while it imports torch
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, before)
    process = processes.Process(target=work, args=(name, flags, log))
    process.start()
    return process


def work(name, flags, log):
    """In the process: the command, whose exit status is the process's, with all that it says in a file."""
    for sign in (signal.SIGINT, signal.SIGTERM):  # train.py stops; its last whole epoch is saved
        signal.signal(sign, signal.default_int_handler)
    threading.Thread(target=end_with_parent, daemon=True).start()
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit((pretrain if name.startswith("encoder-") else train).main(flags))


def end_with_parent():
    """However that ends, also where it is stopped before it knows of this process."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


# ---------------------------------------------------------------------------- the command


def refuse_other_folder(args):
    if args.out.is_dir() and any(args.out.iterdir()) and not (args.out / "runs").is_dir():
        raise ValueError(f"--out {args.out}: holds something else; expected a new folder or an earlier one")


def refuse_other_flags(args, runs):
    """ValueError if a run of that name was made or begun with other flags."""
    for name, flags in runs.items():
        path = args.out / "runs" / name / "config.json"
        before, now = read_json(path) if path.is_file() else {}, configuration(train.parse_args(flags))
        for key in sorted((before.keys() | now) - {"threads", "versions", "out", "device"} if before else ()):
            if before.get(key) != now.get(key):
                raise ValueError(f"{path.parent}: was made with --{key.replace('_', '-')} {before.get(key)}; "
                                 f"now it would be with {now.get(key)}; choose another --out")


def check_data(args):
    """ValueError or OSError now for what the runs would refuse after hours."""
    seeds = (*args.units, *TUNING_UNITS[:2 * (len(args.rates) > 1)])  # each draws its own
    for name in METHODS:
        train.parse_args(common_flags(args, name, args.units[0]))
    for unit in seeds:
        words = common_flags(args, "LP-LoRA", unit) + ["--ntk", str(args.ntk)] * (args.ntk > 0)
        run = train.parse_args(words)
        if args.unit == "language":  # its own encoder may not be there yet
            run.model, run.language = "tiny", tiny.LANGUAGE
        task, *_ = train.load(run)
    if "test" not in task.splits:
        raise ValueError(f"--data {args.data}: has no test split, which tables and claims are about")


def stages(args, command):
    """(title, {name: flags}, processes side by side) in order; the last depends on what came before."""
    tuning = tuning_runs(args)
    refuse_other_flags(args, tuning)
    yield "encoders, minutes each", encoders(args), 1  # each takes two threads
    plan = read_plan(args.out) if (args.out / PLAN).is_file() else {"tuning": None}
    if tuning and plan["tuning"] == tuning:  # a choice is made once, even if what failed would now succeed
        rates = plan["rates"]
    else:
        yield "tuning", tuning, args.jobs
        rates = choose_rates(read_results(args.out, tuning), tuning) if tuning else {
            name: rates_of(args, name)[0] for name in METHODS if name != "LP"}
    runs = main_runs(args, rates)
    refuse_other_flags(args, runs)
    plan = {"command": command, "unit": args.unit, "units": args.units, "rates": rates, "tuning": tuning,
            "runs": runs}
    write_json(args.out / PLAN, plan)
    yield "runs", runs, args.jobs


def reproduce(args, command):
    """All stages, then the report; Failed if a run failed."""
    if args.report:
        return write_report(args.out)
    refuse_other_folder(args)
    with redirect_stdout(sys.stderr):  # what is said of a download is no shell line
        check_data(args)  # a flag that train.py refuses ends here, not after an hour
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    lock, failed = lock_folder(args.out), {}
    try:
        for title, commands, jobs in stages(args, command):
            left = [shell_line(args, *item) for item in commands.items() if not leaves(args, *item).exists()]
            if args.list and left:
                return print("\n".join(left))
            failed |= {} if args.list else run_all(args, commands, title, jobs)
        if args.list:
            return
        print("".join(f"  {name}: {why}\n" for name, why in failed.items()), end="", file=sys.stderr)
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
    return exit_status("lab.reproduce", lambda: reproduce(args, command),
                       lambda: "; the same command goes on")


if __name__ == "__main__":
    run_main(main)
