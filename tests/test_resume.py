"""Runs that are killed go on to the same numbers; what is damaged or not theirs is refused."""

import hashlib
import io
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lpft
import ntk
from lab import pretrain
from plumbing import run_folder
import train
from plumbing.checkpoint import write_safetensors
from conftest import LORA
from data import load_task
from plumbing.export import load_classifier
from model import Classifier
from plumbing.checkpoint import load_pretrained

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def ctrl_c():
    """A process that a shell began in the background ignores SIGINT; these tests are about it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(arguments, home, **how):
    """train.py as its own process, with a cache of its own."""
    return subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, arguments)], text=True, cwd=home,
                            env=os.environ | {"HOME": str(home), "OMP_NUM_THREADS": "1"},
                            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how)


def finish(arguments, home, **how):
    process = start(arguments, home, **how)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def contents(run):
    """What a finished run says and weighs: result.json without seconds, and the bytes of all tensors."""
    result = json.loads((run / "result.json").read_text())
    del result["seconds"]
    return result, (run / "metrics.jsonl").read_text(), (run / "model.safetensors").read_bytes(), (
        (run / "ntk.npz").read_bytes() if (run / "ntk.npz").exists() else None)


def killed_until_done(arguments, run, home, kills, longest, rng, partial=None, at_most=8):
    """Kill the run after random times, `kills` times, resuming it each time; then let it end.

    Returns the stages that were hit, read from what was there after each kill. Pre-training is long: after
    `at_most` kills in it, the next one waits until it is over.
    """
    hit = []
    while len(hit) < kills and not (run / "result.json").exists():
        there = (run / "config.json").exists()
        process = start(["--resume", run] if there else arguments, home, stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL)
        while hit.count("pre-training") >= at_most and any(partial.glob("*.partial")) and process.poll() is None:
            time.sleep(0.1)
        try:
            process.wait(rng.uniform(1.5, longest))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        hit.append(stage_of(run, partial))
    there = (run / "config.json").exists()
    status, _, err = finish(["--resume", run] if there else arguments, home)
    assert status == 0, err
    return hit


def stage_of(run, partial=None):
    if partial and any(partial.glob("*.partial")):
        return "pre-training"
    if not (run / "state").exists():
        return "start or LP"
    parts = run_folder.load_state(run / "state")
    if "ft" in parts:
        return "FT"
    return "after the kernel" if "ntk" in parts else "kernel"


def test_killed_at_random_points_a_run_ends_with_the_same_numbers_and_weights(random_folder, tmp_path):
    """The whole promise of --resume, in one test."""
    flags = ["--model", random_folder, "--epochs", "2", "--ntk", "30", "--save-every", "0", *LORA]
    assert finish([*flags, "--out", tmp_path / "whole"], tmp_path)[0] == 0
    run = tmp_path / "killed"
    killed_until_done([*flags, "--out", run], run, tmp_path, 4, 6, random.Random(0))
    assert contents(run) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_25_kills_over_pre_training_lp_kernel_and_ft(tmp_path):
    """The main job with the kernel, pre-training included; a quarter of an hour."""
    flags = ["--lora", "--ntk", "100", "--save-every", "0"]
    assert finish([*flags, "--out", tmp_path / "whole"], tmp_path)[0] == 0
    home, rng, hit = tmp_path / "home", random.Random(1), []
    home.mkdir()
    while len(hit) < 25:  # a run that ends before its turn is followed by another
        run = tmp_path / f"killed-{len(hit)}"
        hit += killed_until_done([*flags, "--out", run], run, home, 25 - len(hit), 9, rng, home / ".cache" / "lpft")
        assert contents(run) == contents(tmp_path / "whole")
    print({stage: hit.count(stage) for stage in hit})
    assert {"pre-training", "start or LP", "kernel", "FT"} <= set(hit)


# ---------------------------------------------------------------------------- each stage, in one process


class Stop(KeyboardInterrupt):
    pass


class StoppingState(run_folder.StateFile):
    """Saves whenever it is asked whether to, and presses Ctrl-C when asked for the n-th time."""

    def __init__(self, path, n):
        super().__init__(path)
        self.left = n

    def due(self):
        self.left -= 1
        if self.left == 0:
            raise Stop
        return True


def fine_tuned(random_folder, state=None, **how):
    encoder, tokenizer = load_pretrained(random_folder)
    task = load_task("tiny", tokenizer, max_train=60)
    torch.manual_seed(3)
    model = Classifier(encoder, 3)
    history = train.fine_tune(model, task.splits["train"], task.splits["val"], lr=1e-3, batch_size=8, epochs=2,
                              state=state, **how)
    return history, [p.detach().clone() for p in model.parameters()]


def test_the_best_epoch_so_far_survives_a_stop_in_a_later_one(random_folder, tmp_path, monkeypatch):
    scores = iter(range(0, -100, -1))  # epoch 1 is better than any that follow
    monkeypatch.setitem(lpft.METRICS, "falling", lambda logits, labels: next(scores))
    _, best = fine_tuned(random_folder, metric="falling")
    with pytest.raises(Stop):
        fine_tuned(random_folder, StoppingState(tmp_path / "state", 13), metric="falling")
    _, resumed = fine_tuned(random_folder, run_folder.StateFile.of(tmp_path / "state"), metric="falling")
    assert all(torch.equal(a, b) for a, b in zip(best, resumed))


def test_an_epoch_is_saved_before_anybody_hears_of_it(random_folder, tmp_path):
    """on_epoch writes and prints: a full disk or a closed pipe then costs no epoch."""
    def on_epoch(record):
        if record["epoch"] == 1:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        fine_tuned(random_folder, run_folder.StateFile(tmp_path / "state"), on_epoch=on_epoch)
    assert run_folder.load_state(tmp_path / "state")["ft"]["epoch"] == 2


@pytest.mark.parametrize("step", [1, 5, 8, 13])
def test_fine_tuning_stopped_inside_an_epoch_goes_on_bit_for_bit(step, random_folder, tmp_path):
    """Weights, Adam, schedule, dropout, order and the running means: one of them wrong and this fails."""
    history, weights = fine_tuned(random_folder)
    with pytest.raises(Stop):
        fine_tuned(random_folder, StoppingState(tmp_path / "state", step))
    found = run_folder.load_state(tmp_path / "state")["ft"]
    assert (found["epoch"], found["step"]) == ((step - 1) // 8 + 1, (step - 1) % 8 + 1)
    torch.manual_seed(99)  # whatever the new process drew before
    heard = []
    resumed, resumed_weights = fine_tuned(random_folder, run_folder.StateFile.of(tmp_path / "state"), on_epoch=heard.append)
    assert resumed == history and heard == history[found["epoch"]:]  # nothing is done twice
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed_weights))


def test_any_number_of_workers_gives_the_same_bits(random_folder):
    (history, weights), (other_history, other_weights) = (
        fine_tuned(random_folder, num_workers=workers) for workers in (0, 2))
    assert history == other_history and all(torch.equal(a, b) for a, b in zip(weights, other_weights))


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_wait_for_the_end_of_the_step(name):
    done, before = [], signal.signal(name, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            with run_folder.unbroken():
                signal.raise_signal(name)
                done.append("the rest of the step")
        assert done and signal.getsignal(name) is signal.default_int_handler
    finally:
        signal.signal(name, before)


def test_a_signal_that_is_ignored_hides_no_other():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt):
            with run_folder.unbroken():
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_saving_inside_an_epoch_waits_for_its_time_and_thirty_times_what_it_costs(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run_folder, "save_state", lambda path, state: now.__setitem__(0, now[0] + 2))
    state = run_folder.StateFile(tmp_path / "state", every=10)
    assert not state.due()
    now[0] = 110
    assert state.due()
    state.save(lp=1)
    for passed, due in ((10, False), (59, False), (60, True)):
        now[0] = 112 + passed
        assert state.due() is due


def test_the_seconds_of_all_processes_add_up(tmp_path):
    state = run_folder.StateFile(tmp_path / "state", {"seconds": 50.0})
    state.save()
    assert 50 <= run_folder.load_state(tmp_path / "state")["seconds"] < 60 and 50 <= state.seconds() < 60


def test_a_file_is_on_the_disk_before_it_takes_its_name_and_otherwise_the_old_one_stays(tmp_path, monkeypatch):
    synced, path = [], tmp_path / "model.safetensors"
    monkeypatch.setattr(run_folder.os, "fsync", lambda handle: synced.append(path.exists()))
    write_safetensors(path, {"x": torch.ones(3)})
    assert synced == [False]
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        write_safetensors(path, {"x": torch.zeros(3), "y": torch.zeros(1), "z": Broken()})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


class Broken:
    """A tensor until it is to be written."""

    shape, dtype = (1,), torch.float32

    def numel(self):
        return 1

    def element_size(self):
        return 4


def test_ctrl_c_while_saving_is_an_interruption_with_a_whole_state(tmp_path, monkeypatch):
    write, pressed = run_folder.Hashing.write, []

    def interrupted_write(self, data):
        if not pressed:
            pressed.append(1)
            signal.raise_signal(signal.SIGINT)
        return write(self, data)

    monkeypatch.setattr(run_folder.Hashing, "write", interrupted_write)
    with pytest.raises(KeyboardInterrupt):
        run_folder.save_state(tmp_path / "state", {"x": torch.ones(5)})
    assert torch.equal(run_folder.load_state(tmp_path / "state")["x"], torch.ones(5))


# ---------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def unfinished(random_folder, tmp_path_factory):
    """A run that got SIGTERM, as a cluster sends it, in its FT stage."""
    home = tmp_path_factory.mktemp("unfinished")
    process = start(["--model", random_folder, "--epochs", "200", "--out", "run"], home)
    while not (home / "run" / "state").exists() or "ft" not in run_folder.load_state(home / "run" / "state"):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    return home / "run", process.returncode, err


def copy_of(unfinished, folder):
    run = folder / "run"
    run.mkdir()
    for path in unfinished[0].iterdir():
        (run / path.name).write_bytes(path.read_bytes())
    return run


def refusal(arguments, capsys):
    """The single line with which train.py ends with status 2."""
    try:
        status = train.main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = end.code
    err = capsys.readouterr().err
    *bars, last = err.splitlines()
    assert status == 2 and last.startswith("train.py: error: ") and "Traceback" not in err, err
    assert all("it/s]" in line or "step/s]" in line or not line.strip() for line in bars), err
    return last


def test_an_interrupted_run_says_how_to_go_on(unfinished):
    run, status, err = unfinished
    assert status == 130 and err.splitlines()[-1] == (
        "train.py: interrupted; go on with: python train.py --resume run")
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "lock", "metrics.jsonl", "state"]


def test_a_finished_run_is_not_repeated_and_a_running_one_not_shared(unfinished, random_folder, tmp_path, capsys):
    run = copy_of(unfinished, tmp_path)
    lock = run_folder.lock_folder(run)
    assert "another process that is still running" in refusal(["--resume", run], capsys)
    lock.release()
    assert f"or --resume {run}" in refusal(["--out", run], capsys)
    assert train.main(["--model", str(random_folder), "--method", "lp", "--out", str(tmp_path / "lp")]) == 0
    written = (tmp_path / "lp" / "result.json").stat().st_mtime_ns
    assert train.main(["--resume", str(tmp_path / "lp")]) == 0 and "finished already" in capsys.readouterr().out
    assert (tmp_path / "lp" / "result.json").stat().st_mtime_ns == written


def test_an_lp_run_that_is_stopped_after_lp_ends_with_the_same_numbers(random_folder, tmp_path, monkeypatch):
    def stop(*arguments, **more):
        raise KeyboardInterrupt

    flags = ["--model", str(random_folder), "--method", "lp", "--max-test", "80", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", stop)
        assert train.main([*flags, str(tmp_path / "stopped")]) == 130
    assert train.main(["--resume", str(tmp_path / "stopped")]) == 0
    assert train.main([*flags, str(tmp_path / "whole")]) == 0
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_resume_takes_the_flags_of_the_run_and_no_others(unfinished, tmp_path, capsys):
    run = copy_of(unfinished, tmp_path)
    assert "expected no other flag" in refusal(["--resume", run, "--lr", "1"], capsys)
    assert "holds no config.json" in refusal(["--resume", tmp_path], capsys)
    config = json.loads((run / "config.json").read_text())
    for changed, said in (({"lr": 1.0}, "with --lr 1e-05, now it is 1.0"), ({"lr": -1}, "--lr is -1"),
                          ({"depth": 3}, "'depth' is no flag"), ({"max_train": 100}, "with --max-train None, now it is 100")):
        (run / "config.json").write_text(json.dumps(config | changed))
        assert said in refusal(["--resume", run], capsys)
    (run / "config.json").write_text("{")
    assert "not a JSON file" in refusal(["--resume", run], capsys)


def test_a_resumed_run_takes_its_own_number_of_threads_and_leaves_no_state(unfinished, tmp_path, monkeypatch):
    """Sums over another number of threads round differently; and --resume works from another folder."""
    run = copy_of(unfinished, tmp_path)
    config = json.loads((run / "config.json").read_text())
    assert config["threads"] == 1 and Path(config["model"]).is_absolute()
    assert {"python", "torch", "tokenizers", "numpy"} == config["versions"].keys()
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(train, "load_train_measure", lambda *a: seen.append(torch.get_num_threads()) or {})
    torch.set_num_threads(2)
    try:
        assert train.main(["--resume", str(run)]) == 0
    finally:
        torch.set_num_threads(before)
    assert seen == [1] and not (run / "state").exists()


def test_an_export_of_another_run_is_not_overwritten(unfinished, random_folder, tmp_path, capsys):
    run, export = copy_of(unfinished, tmp_path), tmp_path / "export"
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"export": str(export)}))
    export.mkdir()
    (export / "config.json").write_text("precious")
    assert "not of this run" in refusal(["--resume", run], capsys)
    (export / run_folder.UNFINISHED).write_text(str(tmp_path / "another"))
    assert "not of this run" in refusal(["--resume", run], capsys)
    flags = ["--model", random_folder, "--method", "lp", "--out", tmp_path / "new", "--export", tmp_path / "own"]
    assert train.main([*map(str, flags)]) == 0 and not (tmp_path / "own" / run_folder.UNFINISHED).exists()


@pytest.mark.parametrize("change, said", [
    ({"threads": None}, "threads is None"), ({"threads": 0}, "threads is 0"), ({"resume": "run"}, "'resume' is no flag"),
    ({"help": True}, "'help' is no flag"), ({"method": ["lp"]}, "--method"), ({"seed": {}}, "--seed")])
def test_a_config_that_is_not_of_a_run_is_refused(change, said, unfinished, tmp_path, capsys):
    run = copy_of(unfinished, tmp_path)
    config = json.loads((run / "config.json").read_text()) | change
    (run / "config.json").write_text(json.dumps(config))
    assert said in refusal(["--resume", run], capsys)


def test_a_state_without_a_start_is_not_one_of_a_run(unfinished, tmp_path, capsys):
    run = copy_of(unfinished, tmp_path)
    run_folder.save_state(run / "state", {"step": 5})  # of pre-training, say
    assert "was saved with --batch-size None" in refusal(["--resume", run], capsys)


def test_a_state_of_other_weights_is_refused(unfinished, tmp_path, capsys):
    run = copy_of(unfinished, tmp_path)
    state = run_folder.load_state(run / "state")
    state["start"]["data and encoder"] = "another"
    run_folder.save_state(run / "state", state)
    assert "with data and encoder another" in refusal(["--resume", run], capsys)


def test_a_state_of_another_version_is_refused(unfinished, tmp_path, capsys, monkeypatch):
    run = copy_of(unfinished, tmp_path)
    version = run_folder.VERSION
    monkeypatch.setattr(run_folder, "VERSION", 0)
    assert f"of version {version}, this is 0" in refusal(["--resume", run], capsys)


def test_a_damaged_state_is_refused_wherever_it_is_damaged(unfinished, tmp_path, capsys):
    run, rng = copy_of(unfinished, tmp_path), random.Random(0)
    whole = (run / "state").read_bytes()
    for case in range(40):
        place = rng.randrange(len(whole))
        damaged = whole[:place] if case < 20 else (
            whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1:])
        (run / "state").write_bytes(damaged)
        with pytest.raises(ValueError, match="cut or damaged"):
            run_folder.load_state(run / "state")
    assert "cut or damaged" in refusal(["--resume", run], capsys)
    assert (run / "state").read_bytes() == damaged  # and left for whoever wants to look


def test_code_in_a_state_is_not_run(unfinished, tmp_path, capsys):
    """With a right checksum, too: as if somebody had made the file to harm."""
    run, trap = copy_of(unfinished, tmp_path), tmp_path / "trap"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    buffer = io.BytesIO()
    torch.save({"version": run_folder.VERSION, "torch": str(torch.__version__), "lp": Trap()}, buffer)
    for data in (pickle.dumps(Trap()), buffer.getvalue()):
        (run / "state").write_bytes(data + hashlib.sha256(data).digest())
        assert "not a state that train.py wrote" in refusal(["--resume", run], capsys)
    assert not trap.exists()


def test_a_full_disk_is_one_line_and_leaves_the_last_good_state(unfinished, tmp_path):
    """A limit on the size of files stands in for the disk."""
    run = copy_of(unfinished, tmp_path)
    size = (run / "state").stat().st_size
    status, _, err = finish(["--resume", run], tmp_path, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (size // 2, size // 2)))
    assert status == 1 and "File too large" in err.splitlines()[-1] and "Traceback" not in err
    assert "state" in err.splitlines()[-1]
    run_folder.load_state(run / "state")
    assert not list(run.glob("*.tmp"))


def test_a_loss_that_is_not_finite_stops_at_its_step_with_the_best_weights_before(random_folder, tmp_path, capsys,
                                                                                   monkeypatch):
    flags = ["--model", random_folder, "--max-train", "60", "--epochs", "2", "--method", "ft"]
    assert "in step 2, epoch 1, at --lr 1e+14" in refusal([*flags, "--lr", "1e14", "--out", tmp_path / "a"], capsys)
    assert not (tmp_path / "a" / "model.safetensors").exists()
    train_epoch = lpft.train_epoch

    def breaks_in_epoch_2(model, batches, progress, bar):
        if progress.epoch == 2:
            model.head.weight.data.fill_(1e38)
        train_epoch(model, batches, progress, bar)

    monkeypatch.setattr(lpft, "train_epoch", breaks_in_epoch_2)
    err = refusal([*flags, "--out", tmp_path / "b"], capsys)
    assert "in step 9, epoch 2" in err and "the weights of epoch 1, the best before" in err
    model, _, _ = load_classifier(tmp_path / "b")
    assert float(model.head.weight.detach().abs().max()) < 1


def test_ctrl_c_in_a_step_that_is_not_finite_keeps_the_best_weights_too(random_folder, tmp_path):
    """Saving refuses the state, and that refusal counts as the loss does."""
    state = run_folder.StateFile(tmp_path / "state")

    def on_epoch(record):
        if record["epoch"] == 1:
            raise_in.append(1)

    raise_in, clip = [], torch.nn.utils.clip_grad_norm_

    def not_finite(*arguments, **more):
        if raise_in:
            signal.raise_signal(signal.SIGINT)
            return torch.tensor(float("inf"))
        return clip(*arguments, **more)

    torch.nn.utils.clip_grad_norm_ = not_finite
    try:
        with pytest.raises(lpft.NotFinite, match="in step 9, epoch 2") as end:
            fine_tuned(random_folder, state, on_epoch=on_epoch)
    finally:
        torch.nn.utils.clip_grad_norm_ = clip
    assert end.value.kept_epoch == 1
    assert run_folder.load_state(tmp_path / "state")["ft"]["epoch"] == 2  # the last good one


def test_memory_that_runs_out_is_one_line_with_what_to_lower(random_folder, tmp_path, capsys, monkeypatch):
    def full(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    for module, name, said in ((train, "fine_tune", "lower --batch-size or --max-length"),
                               (ntk, "empirical_ntk", "lower --ntk or --max-length"),
                               (train, "evaluate", "lower --max-length, --batch-size or --max-train")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            out = tmp_path / name
            assert train.main(["--model", str(random_folder), "--method", "ft", "--epochs", "1", "--ntk", "40", "--out",
                               str(out)]) == 1
            last = capsys.readouterr().err.splitlines()[-1]
            assert last == f"train.py: error: out of memory; {said}"
