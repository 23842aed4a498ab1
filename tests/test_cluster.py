"""The list of lab.reproduce on a real Slurm of one node, by GNU parallel, and from two machines at once.

Slurm is Debian's: apt-get install slurm-wlm munge parallel. It is started here, from a folder of its own, and
stopped again; nothing of it stays. What is not installed is skipped.
"""

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import write_reviews
from plumbing.files import load_tensors

ROOT = Path(__file__).resolve().parents[1]
PATH = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))  # where Debian has daemons
EPOCHS = 20  # seconds of FT stage: time to be killed in
pytestmark = pytest.mark.slow


def needs(*programs):
    """Skip where one of these is not installed."""
    missing = [program for program in programs if shutil.which(program, path=PATH) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge, parallel)")


def wait_until(true, what, seconds=60, log=lambda: ""):
    """Look again and again; fails with `what` and log() when the time is over."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not after {seconds} s\n{log()}"
        time.sleep(0.05)


# ---------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def reproduce(random_folder, tmp_path_factory):
    """reproduce(out, *words): what lab.reproduce prints. 14 runs: two seeds of five methods, one factor."""
    data = tmp_path_factory.mktemp("cluster") / "reviews"
    write_reviews(data)
    flags = ["--data", data, "--model", random_folder, "--seeds", 2, "--rates", 20, "--scales", 10,
             "--ntk", 40, "--epochs", EPOCHS, "--max-length", 16, "--jobs", 2]

    def run(out, *words):
        command = [sys.executable, "-m", "lab.reproduce", *map(str, flags), "--out", str(out), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def local(reproduce, tmp_path_factory):
    """The folder of the same runs by one command on this machine."""
    out = tmp_path_factory.mktemp("local") / "out"
    reproduce(out)
    assert len(numbers(out)) == 2 + 14
    return out


def numbers(out):
    """{file: what it says}: claims, tables, and of each run its weights and all it says but its seconds."""
    said = {name: json.loads((out / name).read_text()) for name in ("claims.json", "tables.json")}
    for run in (out / "runs").iterdir():
        if run.is_dir():
            result = json.loads((run / "result.json").read_text())
            del result["seconds"]
            files = ("metrics.jsonl", "model.safetensors")
            said[run.name] = result, *((run / name).read_bytes() for name in files)
    return said


def assert_same_numbers(out, other):
    """Names what differs: the weights in it are too long to be printed."""
    found, expected = numbers(out), numbers(other)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def copy_without(local, out, *names):
    """The same folder, in which these runs are still to be made."""
    shutil.copytree(local, out, ignore=shutil.ignore_patterns("claims.json", "tables.json"))
    for name in names:
        shutil.rmtree(out / "runs" / name)


def epochs_saved(run):
    """How many epochs of its FT stage a run that is not finished has saved; epoch 0 is the start."""
    try:
        return len(load_tensors(run / "state")["history"]) - 1
    except FileNotFoundError:
        return -1


def times(folder, name="*"):
    """When each file of the runs was written last; locks are opened by those that are refused, too."""
    return {path: path.stat().st_mtime_ns for path in folder.glob(f"runs/*/{name}") if path.name != "lock"}


# ---------------------------------------------------------------------------- Slurm

SLURM_CONF = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def free_ports():
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


@pytest.fixture(scope="module")
def slurm():
    """slurm(*command): what a command of Slurm prints, of a cluster of one node with room for two tasks.

    Its four processors are claimed, whatever the machine has: lab/slurm.sh asks for two a task.
    """
    needs("munged", "slurmctld", "slurmd", "sbatch", "scancel", "squeue", "sinfo")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short name: that of a socket has at most 107 bytes
    for name in ("state", "spool"):
        (folder / name).mkdir()
    ports, user, host = free_ports(), getpass.getuser(), socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, user=user, host=host, ports=ports))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    own = {name: f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
    environment, daemons = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}, []

    def start(*command):
        with open(folder / f"{command[0]}.log", "wb") as log:
            daemons.append(subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log))

    def run(*command, cwd=folder, check=True):
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}\n{logs()}"
        return done.stdout.strip()

    def logs():
        return "\n".join(f"---- {log.name}\n{log.read_text(errors='replace')[-4000:]}"
                         for log in folder.glob("*.log"))

    try:
        start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *own.values())
        wait_until((folder / "munge.socket").exists, "munged listens", log=logs)
        start("slurmctld", "-D")
        start("slurmd", "-D")
        wait_until(lambda: run("sinfo", "-h", "-o%T", check=False) == "idle", "the node is idle", log=logs)
        yield run
        run("scancel", "--user", user)
        wait_until(lambda: not run("squeue", "-h"), "Slurm has no job", log=logs)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_slurm_array_with_tasks_cancelled_and_submitted_again_gives_the_numbers_of_a_local_run(
        reproduce, slurm, local, tmp_path):
    """Twelve tasks, two of them cancelled; then the list holds these two, and they go on where they were."""
    out, todo = tmp_path / "out", tmp_path / "todo.txt"

    def submit():
        """As lab/README.md says; returns the lines and the number of the array."""
        todo.write_text(reproduce(out, "--list"))
        lines = todo.read_text().splitlines()
        command = "sbatch", "--parsable", f"--array=1-{len(lines)}", f"{ROOT}/lab/slurm.sh", "todo.txt"
        return lines, slurm(*command, cwd=tmp_path)

    for line in reproduce(out, "--list").splitlines()[:2]:  # elsewhere: what is done is in no list
        subprocess.run(["sh", "-c", line], check=True, capture_output=True)
    lines, array = submit()
    assert len(lines) == 12
    tasks = {name: [f"/{name}/" in line for line in lines].index(True) + 1 for name in ("LoRA-0", "LP-FT-1")}
    # SIGTERM, and as soon as the script has ended, which is at once, SIGKILL for what is left of the task
    wait_until(lambda: epochs_saved(out / "runs/LoRA-0") >= 2, "LoRA-0 is in its FT stage", 300)
    slurm("scancel", f"{array}_{tasks['LoRA-0']}")
    wait_until((out / "runs/LP-FT-1/config.json").exists, "LP-FT-1 has begun", 300)
    slurm("scancel", f"{array}_{tasks['LP-FT-1']}")
    wait_until(lambda: not slurm("squeue", "-h"), "the array ends", 600)
    assert 2 <= epochs_saved(out / "runs/LoRA-0") < EPOCHS
    finished = times(out, "result.json")
    begun = {path: at for path, at in times(out, "config.json").items() if path.parent.name in tasks}
    assert len(finished) == 12 and len(begun) == 2
    for task in tasks.values():
        assert "CANCELLED" in (tmp_path / f"slurm-{array}-{task}.txt").read_text()

    again, array = submit()
    assert again == [lines[task - 1] for task in tasks.values()]  # the same lines go on
    wait_until(lambda: not slurm("squeue", "-h"), "the array ends", 600)
    assert finished.items() <= times(out, "result.json").items()
    assert begun.items() <= times(out, "config.json").items()
    assert reproduce(out, "--list") == ""
    reproduce(out, "--report")
    assert_same_numbers(out, local)


# ---------------------------------------------------------------------------- GNU parallel


@pytest.fixture(scope="module")
def gnu():
    needs("parallel")
    if "GNU" not in subprocess.run(["parallel", "--version"], capture_output=True, text=True).stdout:
        pytest.skip("not installed: GNU parallel (the parallel that is there is another)")


def test_gnu_parallel_with_a_run_killed_and_begun_again_gives_the_numbers_of_a_local_run(
        gnu, reproduce, local, tmp_path):
    """Four runs on two machines, whose ssh is a shell here; the one that is killed is in the next list."""
    out, todo, ssh = tmp_path / "out", tmp_path / "todo.txt", tmp_path / "ssh"
    copy_without(local, out, "FT-0", "LP-FT-scale10-0", "LP-1", "LP-LoRA-1")
    ssh.write_text(f"#!/bin/sh\n# HOST -- COMMAND\necho $1 >> {tmp_path}/hosts\nshift 2\n"
                   'SHELL=/bin/sh exec sh -c "$*"\n')
    ssh.chmod(0o700)

    def parallel():
        """As lab/README.md says, one run at a time on each machine."""
        todo.write_text(reproduce(out, "--list"))
        command = "parallel --sshlogin one,two --workdir . --jobs 1".split()
        with open(todo) as lines, open(tmp_path / "said", "w") as said:
            return subprocess.Popen(command, stdin=lines, stdout=said, stderr=said, cwd=tmp_path,
                                    env=os.environ | {"PARALLEL_SSH": str(ssh), "HOME": str(tmp_path)})

    process, run = parallel(), out / "runs/LP-FT-scale10-0"
    lines = todo.read_text().splitlines()
    assert len(lines) == 4
    wait_until(lambda: epochs_saved(run) >= 2 or process.poll() is not None, "a run is in its FT stage", 300)
    assert process.poll() is None, (tmp_path / "said").read_text()
    os.kill(process_of(run), signal.SIGKILL)
    assert process.wait(600) == 1  # so many failed
    assert {*(tmp_path / "hosts").read_text().split()} == {"one", "two"}
    assert 2 <= epochs_saved(run) < EPOCHS
    finished, begun = times(out, "result.json"), times(out, "config.json")
    assert len(finished) == 13

    process = parallel()
    assert todo.read_text().splitlines() == [line for line in lines if f"/{run.name}/" in line]
    assert process.wait(600) == 0, (tmp_path / "said").read_text()
    assert finished.items() <= times(out, "result.json").items() and begun == times(out, "config.json")
    assert reproduce(out, "--list") == ""
    reproduce(out, "--report")
    assert_same_numbers(out, local)


def process_of(run):
    """The number of the train.py that works on the run."""
    said = subprocess.run(["ps", "-ewwo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    number, = (line.split()[0] for line in said.splitlines()
               if line.split()[1] == sys.executable and line.endswith(f" --out {run}"))
    return int(number)


# ---------------------------------------------------------------------------- two machines, one folder


# if both begin within milliseconds, the second finds what the first has just made
REFUSED = ("another process that is still running uses it", "holds something already", "File exists")


def test_of_two_machines_with_the_same_list_one_does_each_run(reproduce, local, tmp_path):
    """What the other works on is refused in one line, what it finished is left; each run is made once."""
    out, places = tmp_path / "out", [tmp_path / "one", tmp_path / "two"]
    copy_without(local, out, "LP-0", "FT-0", "LoRA-1", "LP-FT-1")
    lines = reproduce(out, "--list").splitlines()
    assert len(lines) == 4

    def work(place):
        place.mkdir(exist_ok=True)
        how = {"cwd": place, "capture_output": True, "text": True}
        return [subprocess.run(["sh", "-c", line], **how) for line in lines]

    with ThreadPoolExecutor(2) as pool:
        both = [*zip(*pool.map(work, places))]
    refused = 0
    for pair in both:
        idle, worked = sorted(pair, key=lambda done: "result: " in done.stdout)
        assert (worked.returncode, "result: " in worked.stdout) == (0, True), worked.stderr
        if idle.returncode:
            refused += 1
            assert idle.returncode == 2 and len(idle.stderr.splitlines()) == 1 and not idle.stdout
            assert any(said in idle.stderr for said in REFUSED), idle.stderr
        elif idle.stdout:  # the other came to its end while this process started
            refused += 1
            assert idle.stdout.startswith("finished already: ") and not idle.stderr
        else:
            assert not idle.stderr
    assert refused
    before = times(out)
    assert all(done.returncode == 0 and done.stdout + done.stderr == "" for done in work(places[0]))
    assert times(out) == before and not any(any(place.iterdir()) for place in places)
    reproduce(out, "--report")
    assert_same_numbers(out, local)
