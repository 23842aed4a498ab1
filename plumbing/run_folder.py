"""How a run survives: one process to a folder, files that are whole or absent, a state to go on from.

    take_lock, lock_folder     refuses what a live process uses
    write_whole, write_text    a file is the old one or the new one, never a part of either
    save_state, load_state     tensors and numbers with a checksum; never code
    random_state, set_random_state
    unbroken                   Ctrl-C waits for the end of a step
    StateFile                  the state of a run, replaced whole, not more often than is cheap
    claim_folders, release_folders   --out and --export, new or as an interrupted run left them
    memory_advice, status_of   what is said where memory or disk runs out

Apart from `train.py` because pre-training, training and lab.reproduce all use it.
"""

import errno
import hashlib
import io
import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout  # PyTorch needs it too

LOCK = "lock"  # name of the lock file in a folder
UNFINISHED = "unfinished-run"  # a file in --export until it is whole, with the path of --out
VERSION = 2  # of what states hold; higher when an older state cannot be gone on with


def take_lock(path, wait=False):
    """Lock the file `path` until this process ends, however it ends; if another has it, wait or ValueError.

    Keep what is returned: the lock goes with it. The file stays: deleting it would part those who wait from
    those who come later.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise ValueError(f"{Path(path).parent}: another process that is still running uses it") from None
        print(f"waiting for another process, which has {path}", flush=True)
        lock.acquire()
    return lock


def lock_folder(folder):
    return take_lock(Path(folder) / LOCK)


@contextmanager
def write_whole(path):
    """A binary file to write to that takes the name `path` when all of it is on the disk, or never."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the new name with nothing in it
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None  # write() does not say which file
        raise


def write_text(path, text):
    with write_whole(path) as file:
        file.write(text.encode("utf-8"))


class Hashing:
    """What is written to it goes to `file`, and into a SHA-256."""

    def __init__(self, file):
        self.file, self.sha256, self.failed = file, hashlib.sha256(), None

    def write(self, data):
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.failed = error
            raise

    def flush(self):
        self.file.flush()


def save_state(path, state):
    """Write a dict of tensors, numbers, strings, lists and dicts: torch.save's bytes, then their SHA-256.

    It also gets the versions that have to be the same for the numbers to come out the same.
    """
    with unbroken(), write_whole(path) as file:  # Ctrl-C inside torch.save would be a RuntimeError
        hashing = Hashing(file)
        try:
            torch.save(state | {"version": VERSION, "torch": str(torch.__version__)}, hashing)
        except RuntimeError:
            if hashing.failed:  # what the file said: torch hides it
                raise hashing.failed from None
            raise
        file.write(hashing.sha256.digest())


def load_state(path):
    """What save_state wrote, on the CPU. ValueError for a damaged file and one of another version.

    The checksum finds every cut and every flipped bit. Against files made to harm it is no help, but
    weights_only=True is: it builds tensors and plain values and runs nothing.
    """
    data = memoryview(Path(path).read_bytes())
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise ValueError(f"{path}: is cut or damaged (its checksum is not that of its {len(data)} bytes); delete it to "
                         "start from the beginning")
    try:
        state = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
        found = {"version": state["version"], "torch": state["torch"]}
    except Exception as error:  # torch raises many types for what is not its own
        raise ValueError(f"{path}: not a state that train.py wrote ({type(error).__name__})") from None
    for name, here in (("version", VERSION), ("torch", str(torch.__version__))):
        if found[name] != here:
            raise ValueError(f"{path}: of {name} {str(found[name])[:40]}, this is {here}; the result would not be that "
                             "of an uninterrupted run, so start a new run")
    return state


def random_state(device):
    """The state of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_random_state(state):
    torch.set_rng_state(state["cpu"])
    for kind in state.keys() - {"cpu"}:
        getattr(torch, kind).set_rng_state(state[kind])


@contextmanager
def unbroken():
    """Ctrl-C and SIGTERM wait until the block is through, then do what they would have done.

    If the block raises, its exception is what ends the program.
    """
    if threading.current_thread() is not threading.main_thread():  # it gets no signals
        yield
        return
    arrived, names = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(name, lambda number, frame: arrived.append(number)) for name in names]
    try:
        yield
    finally:
        for name, handler in zip(names, before):
            signal.signal(name, handler or signal.SIG_DFL)
    for number in dict.fromkeys(arrived):  # to whoever was to get it; one that is ignored hides no other
        signal.raise_signal(number)


class StateFile:
    """The state of a run in one file: `parts`, {stage: what the stage needs to go on}.

    save() replaces the file. due() says whether `every` seconds have passed since, and 30 times what saving
    took: inside a stage that asks it, saving costs 3 % at most.
    """

    def __init__(self, path, parts=None, every=60.0):
        self.path, self.parts, self.every = Path(path), parts or {}, every
        self.opened = time.monotonic()
        self.not_before = self.opened + every

    @classmethod
    def of(cls, path, every=60.0):
        """The state in the file, or an empty one if there is no such file."""
        return cls(path, load_state(path) if Path(path).is_file() else None, every)

    def seconds(self):
        """Since the run began, over all processes that worked on it; what a killed one did not save does not count."""
        return time.monotonic() - self.opened + self.parts.get("seconds", 0.0)

    def save(self, **parts):
        self.parts |= parts
        started = time.monotonic()
        save_state(self.path, self.parts | {"seconds": self.seconds()})
        ended = time.monotonic()
        self.not_before = ended + max(self.every, 30 * (ended - started))

    def due(self):
        return time.monotonic() >= self.not_before


# ---------------------------------------------------------------------------- the folders of a run


def claim_folders(args):
    """Create --out, or runs/DATA-MODEL-METHOD-seedS with a number behind it, and --export; lock --out.

    Returns (lock, folders that were not there before). A resumed run has its folders.
    """
    if args.resume:
        lock, marker = lock_folder(args.out), args.export and args.export / UNFINISHED
        if marker and any(args.export.glob("*")) and not (
                marker.is_file() and marker.read_text(encoding="utf-8") == str(args.out.resolve())):
            raise ValueError(f"--export {args.export}: holds something that is not of this run")
        return lock, []
    made = []
    if args.out is None:
        name = "-".join([Path(args.data).name, Path(args.model).name, args.method]
                        + ["lora"] * args.lora + [f"seed{args.seed}"])
        args.out, number = Path("runs") / name, 1
        while args.out.exists():
            number += 1
            args.out = Path("runs") / f"{name}-{number}"
    if args.export and args.export.resolve() == args.out.resolve():
        raise ValueError(f"--export {args.export}: is also --out; expected another folder")
    for flag, folder in (("--export", args.export), ("--out", args.out)):
        if folder and folder.is_file():
            raise ValueError(f"{flag} {folder}: is a file already; expected a new or empty folder")
        if folder and folder.is_dir() and any(path.name not in (LOCK, "config.json.tmp") for path in folder.iterdir()):
            unfinished = folder == args.out and not (folder / "result.json").is_file()
            raise ValueError(f"{flag} {folder}: holds something already; expected a new or empty folder"
                             + f", or --resume {folder}" * (unfinished and (folder / "config.json").is_file()))
    for folder in filter(None, (args.out, args.export)):
        if not folder.exists():
            made.append(folder)
            folder.mkdir(parents=True)
    lock = lock_folder(args.out)
    if (args.out / "config.json").exists():  # of two commands that found it empty, one was first
        raise ValueError(f"--out {args.out}: holds something already; expected a new or empty folder")
    if args.export:
        with open(args.export / UNFINISHED, "x", encoding="utf-8") as file:
            file.write(str(args.out.resolve()))
    return lock, made


def release_folders(args, lock, made):
    """After a failure before anything was saved, leave nothing that blocks the corrected command."""
    lock.release()
    for name in (LOCK, "config.json", "metrics.jsonl", "ntk.npz"):
        (args.out / name).unlink(missing_ok=True)
    if args.export:
        (args.export / UNFINISHED).unlink(missing_ok=True)
    for folder in made:
        if not any(folder.iterdir()):
            folder.rmdir()


# ---------------------------------------------------------------------------- what the machine lacks


class OutOfMemory(MemoryError):
    """Its message says what to lower."""


@contextmanager
def memory_advice(advice):
    """Where memory runs out, OutOfMemory with what to lower; advice from further inside is better and stays."""
    try:
        yield
    except OutOfMemory:
        raise
    except (MemoryError, RuntimeError) as error:  # PyTorch's are RuntimeErrors
        if "DataLoader worker" in str(error):
            raise OutOfMemory("a process of --num-workers was ended, perhaps for want of memory; lower it") from None
        full = isinstance(error, MemoryError) or any(
            words in str(error) for words in ("out of memory", "can't allocate memory"))  # of a GPU, of a CPU
        if not full:
            raise
        raise OutOfMemory(f"out of memory; lower {advice}") from None


def status_of(error):
    """The exit status for an OSError: 1 where a disk is full or broken, 2 where a name is wrong."""
    broken = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    return 1 if isinstance(error, OSError) and error.errno in broken else 2
