"""How a run survives: one process to a folder, files that are whole or absent, a state after every epoch.

    lock_folder                refuses a folder that a live process uses
    RunState                   the FT stage after its last whole epoch: saved, checked, taken up again
    run_in_folder              --out and --export, new or as an interrupted run left them
"""

import hashlib
import platform
import shlex
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
from filelock import FileLock, Timeout  # PyTorch needs it too

from plumbing import devices, flags
from plumbing.files import load_tensors, save_tensors, write_json, write_text

LOCK = "lock"  # name of the lock file in a folder
UNFINISHED = "unfinished-run"  # a file in --export until it is whole, with the path of --out
VERSION = 4  # of what states hold; higher when an older state cannot be gone on with


def lock_folder(folder):
    """Lock the folder until this process ends, however it ends; ValueError if another process has it.

    Keep what is returned: the lock goes with it.
    """
    lock = FileLock(Path(folder) / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder}: another process that is still running uses it") from None
    return lock


# ---------------------------------------------------------------------------- the state of a run


class RunState:
    """The FT stage after its last whole epoch, in one file: tensors, numbers and strings with a SHA-256.

    `start` says what the run is: flags, data, weights. A state of another start, version or torch is refused
    by load(), because its result would not be that of an uninterrupted run. What comes before the FT stage is
    not saved: it is computed again, to the same bits.
    """

    def __init__(self, path):
        self.path, self.opened = Path(path), time.monotonic()
        self.start, self.saved = None, {}

    def load(self, start):
        """Read the file if it is there; ValueError if it is damaged, or not of this start."""
        here = {"version": VERSION, "torch": str(torch.__version__), "threads": torch.get_num_threads()}
        self.start = start | here
        if not self.path.is_file():
            return
        saved = load_tensors(self.path)
        before = saved.get("start", {})
        for name in sorted(before | self.start, key=lambda name: name != "version"):  # it explains others
            if before.get(name) != self.start.get(name):
                raise ValueError(f"{self.path}: was saved with {name} {str(before.get(name))[:40]}, now it "
                                 f"is {str(self.start.get(name))[:40]}; the result would not be that of an "
                                 "uninterrupted run, so start a new run")
        self.saved = saved

    def seconds(self):
        """Since the run began: up to the last saved epoch, and since this process started."""
        return time.monotonic() - self.opened + self.saved.get("seconds", 0.0)

    def restore(self, model, optimizer, schedule):
        """Put the last saved epoch into these three; (history, best epoch's weights), ([], None) if none."""
        if "weights" not in self.saved:
            return [], None
        model.load_state_dict(self.saved["weights"], strict=False)  # frozen weights are unchanged
        optimizer.load_state_dict(self.saved["optimizer"])
        schedule.load_state_dict(self.saved["schedule"])
        devices.set_random_state(self.saved["random"])
        history, best = self.saved["history"], self.saved["best"]
        self.saved = {"seconds": self.saved["seconds"]}  # the tensors would take memory to the end of the run
        return history, best

    def save(self, model, optimizer, schedule, history, best):
        """After an epoch. The file is replaced whole."""
        save_tensors(self.path, {
            "start": self.start, "seconds": self.seconds(), "history": history, "best": best,
            "weights": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
            "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
            "random": devices.random_state(devices.device_of(model))})


# ---------------------------------------------------------------------------- the folders of a run


def run_in_folder(args, run):
    """Call run(args, RunState) where it holds --out and --export alone, unless it is finished already.

    If it ends well, its state goes; if it fails before anything is saved, so do the folders it made.
    """
    args.device = devices.choose_device(args.device).type
    lock, made = claim_folders(args)  # before minutes of work, so that an unusable --out costs none
    state = RunState(args.out / "state")
    try:
        if (args.out / "result.json").is_file():
            print(f"finished already: {args.out}")
        else:
            if args.resume:
                torch.set_num_threads(args.threads)  # another number adds in another order
            else:
                write_json(args.out / "config.json", flags.configuration(args) | {
                    "threads": torch.get_num_threads(),
                    "versions": {"python": platform.python_version(), "torch": torch.__version__,
                                 "tokenizers": tokenizers.__version__, "numpy": np.__version__}})
            run(args, state)
        state.path.unlink(missing_ok=True)
        if args.export:
            (args.export / UNFINISHED).unlink(missing_ok=True)
    except Exception:
        if not (args.resume or state.path.is_file() or (args.out / "model.safetensors").is_file()):
            release_folders(args, lock, made)
        raise
    finally:
        lock.release()


def fingerprint(task, encoder):
    """SHA-256 of the encoded texts, labels and weights that a run starts from."""
    digest = hashlib.sha256()
    texts = [array for s in task.splits.values() for array in (s.ids, s.types, s.lengths, s.labels)]
    for array in (*texts, *encoder.state_dict().values()):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def how_to_go_on(out):
    """What an interrupted run says."""
    begun = out and (out / "config.json").is_file()
    return f"; go on with: python train.py --resume {shlex.quote(str(out))}" if begun else ""


def claim_folders(args):
    """Create --out, or runs/DATA-MODEL-METHOD-seedS with a number behind it, and --export; lock --out.

    Returns (lock, folders that were not there before).
    """
    if args.out is None:
        name = "-".join([Path(args.data).name, Path(args.model).name, args.method]
                        + ["lora"] * args.lora + [f"seed{args.seed}"])
        args.out, number = Path("runs") / name, 1
        while args.out.exists():
            number += 1
            args.out = Path("runs") / f"{name}-{number}"
    if args.export and args.export.resolve() == args.out.resolve():
        raise ValueError(f"--export {args.export}: is also --out; expected another folder")
    finished, begun = ((args.out / name).is_file() for name in ("result.json", "config.json"))
    if args.resume:
        marker = args.export and args.export / UNFINISHED
        if marker and not finished and any(args.export.glob("*")) and not (
                marker.is_file() and marker.read_text(encoding="utf-8") == str(args.out.resolve())):
            raise ValueError(f"--export {args.export}: holds something that is not of this run")
        return lock_folder(args.out), []
    for flag, folder in ("--export", args.export), ("--out", args.out):
        if folder is None:
            continue
        if folder.is_file():
            raise ValueError(f"{flag} {folder}: is a file already; expected a new or empty folder")
        own = (LOCK, "config.json.tmp", UNFINISHED)
        if folder.is_dir() and any(path.name not in own for path in folder.iterdir()):
            go_on = f", or --resume {folder}" * (flag == "--out" and begun and not finished)
            raise ValueError(f"{flag} {folder}: holds something already; expected a new or empty "
                             f"folder{go_on}")
    made = [folder for folder in (args.export, args.out) if folder and not folder.exists()]
    for folder in made:
        folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(args.out)
    if (args.out / "config.json").exists():  # of two commands that found it empty, one was first
        raise ValueError(f"--out {args.out}: holds something already; expected a new or empty folder")
    if args.export:
        write_text(args.export / UNFINISHED, str(args.out.resolve()))
    return lock, made


def release_folders(args, lock, made):
    """After a failure before anything was saved, leave nothing that blocks the corrected command."""
    for name in ("config.json", "metrics.jsonl", "ntk.npz", "logits.npz"):
        (args.out / name).unlink(missing_ok=True)
    if args.export:
        (args.export / UNFINISHED).unlink(missing_ok=True)
    lock.release()
    (args.out / LOCK).unlink(missing_ok=True)
    for folder in sorted(made, key=lambda folder: len(folder.resolve().parts), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
