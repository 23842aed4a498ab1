"""How a run survives: one process to a folder, files that are whole or absent, a state to go on from.

    take_lock, lock_folder     refuses what a live process uses
    write_whole, write_text    a file is the old one or the new one, never a part of either
    save_state, load_state     tensors and numbers with a checksum; never code
    random_state, set_random_state
    unbroken                   Ctrl-C waits for the end of a step
    StateFile                  the state of a run, replaced whole, not more often than is cheap

Apart from `train.py` because pre-training, training and reproduce.py all use it.
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
VERSION = 1  # of what states hold; higher when an older state cannot be gone on with


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
    """Ctrl-C and SIGTERM wait until the block is through, then do what they would have done."""
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
        """Since the run began, over all processes that worked on it."""
        return time.monotonic() - self.opened + self.parts.get("seconds", 0.0)

    def save(self, **parts):
        self.parts |= parts
        started = time.monotonic()
        save_state(self.path, self.parts | {"seconds": self.seconds()})
        ended = time.monotonic()
        self.not_before = ended + max(self.every, 30 * (ended - started))

    def due(self):
        return time.monotonic() >= self.not_before


def status_of(error):
    """The exit status for an OSError: 1 where a disk is full or broken, 2 where a name is wrong."""
    broken = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    return 1 if isinstance(error, OSError) and error.errno in broken else 2
