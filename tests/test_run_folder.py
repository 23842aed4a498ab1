"""Runs that are killed go on to the same numbers; what is damaged or not theirs is refused."""

import hashlib
import io
import json
import math
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
import predict as predict_command
from plumbing import export, files, run_folder
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


def killed_until_done(arguments, run, home, kills, longest, rng):
    """Kill the run after random times, `kills` times, resuming it each time; then let it end.

    Returns how many whole epochs were saved at each kill; -1 before the first.
    """
    hit = []
    while len(hit) < kills and not (run / "result.json").exists():
        there = (run / "config.json").exists()
        process = start(["--resume", run] if there else arguments, home, stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(1.5, longest))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        hit.append(len(files.load_tensors(run / "state")["history"]) - 1 if (run / "state").exists() else -1)
    there = (run / "config.json").exists()
    status, _, err = finish(["--resume", run] if there else arguments, home)
    assert status == 0, err
    return hit


def test_killed_at_random_points_a_run_ends_with_the_same_numbers_and_weights(random_folder, tmp_path):
    """The whole promise of --resume, in one test."""
    flags = ["--model", random_folder, "--epochs", "6", "--ntk", "30", *LORA]
    assert finish([*flags, "--out", tmp_path / "whole"], tmp_path)[0] == 0
    run = tmp_path / "killed"
    killed_until_done([*flags, "--out", run], run, tmp_path, 3, 6, random.Random(0))
    assert contents(run) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_25_kills_over_a_long_ft_stage(tmp_path):
    """The main job with the kernel and 200 epochs, killed at any time of it; a quarter of an hour."""
    flags, began = ["--lora", "--ntk", "100", "--epochs", "200"], time.monotonic()
    assert finish([*flags, "--out", tmp_path / "whole"], tmp_path)[0] == 0
    seconds, rng, hit = time.monotonic() - began, random.Random(1), []
    while len(hit) < 25:  # a run that ends before its turn is followed by another
        run = tmp_path / f"killed-{len(hit)}"
        hit += killed_until_done([*flags, "--out", run], run, tmp_path, 25 - len(hit), seconds, rng)
        assert contents(run) == contents(tmp_path / "whole")
    print(hit)
    assert len(set(hit)) > 10


# ---------------------------------------------------------------------------- the FT stage, in one process


class Stop(KeyboardInterrupt):
    pass


def stop_after(epoch):
    """on_epoch that presses Ctrl-C once the epoch is over."""
    def on_epoch(record):
        if record["epoch"] == epoch:
            raise Stop

    return on_epoch


def state_in(folder):
    """The state of a run in `folder`, as --resume reads it."""
    state = run_folder.RunState(folder / "state")
    state.load({"seed": 3})
    return state


def fine_tuned(random_folder, state=None, **how):
    encoder, tokenizer = load_pretrained(random_folder)
    task = load_task("tiny", tokenizer, max_train=60)
    torch.manual_seed(3)
    model = Classifier(encoder, 3)
    history = train.fine_tune(model, task.splits["train"], task.splits["val"], lr=1e-3, batch_size=8, epochs=3,
                              state=state, **how)
    return history, [p.detach().clone() for p in model.parameters()]


def test_the_best_epoch_so_far_survives_a_stop_in_a_later_one(random_folder, tmp_path, monkeypatch):
    scores = iter(range(0, -100, -1))  # epoch 1 is better than any that follow
    monkeypatch.setitem(lpft.METRICS, "falling", lambda logits, labels: next(scores))
    _, best = fine_tuned(random_folder, metric="falling")
    with pytest.raises(Stop):
        fine_tuned(random_folder, state_in(tmp_path), metric="falling", on_epoch=stop_after(2))
    _, resumed = fine_tuned(random_folder, state_in(tmp_path), metric="falling")
    assert all(torch.equal(a, b) for a, b in zip(best, resumed))


def test_an_epoch_is_saved_before_anybody_hears_of_it(random_folder, tmp_path):
    """on_epoch writes and prints: a full disk or a closed pipe then costs no epoch."""
    with pytest.raises(Stop):
        fine_tuned(random_folder, state_in(tmp_path), on_epoch=stop_after(1))
    assert [record["epoch"] for record in state_in(tmp_path).saved["history"]] == [0, 1]


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_fine_tuning_stopped_after_an_epoch_goes_on_bit_for_bit(epoch, random_folder, tmp_path):
    """Weights, Adam, schedule, dropout and the order: one of them wrong and this fails."""
    history, weights = fine_tuned(random_folder)
    with pytest.raises(Stop):
        fine_tuned(random_folder, state_in(tmp_path), on_epoch=stop_after(epoch))
    torch.manual_seed(99)  # whatever the new process drew before
    heard = []
    resumed, resumed_weights = fine_tuned(random_folder, state_in(tmp_path), on_epoch=heard.append)
    assert resumed == history and heard == history[epoch + 1:]  # nothing is done twice
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed_weights))


def test_the_seconds_of_all_processes_add_up(random_folder, tmp_path):
    state = state_in(tmp_path)
    state.saved = {"seconds": 50.0}
    fine_tuned(random_folder, state)
    assert 50 <= state_in(tmp_path).saved["seconds"] < 80 and 50 <= state_in(tmp_path).seconds() < 80


def test_a_file_is_on_the_disk_before_it_takes_its_name_and_otherwise_the_old_one_stays(tmp_path, monkeypatch):
    synced, path = [], tmp_path / "model.safetensors"
    monkeypatch.setattr(files.os, "fsync", lambda handle: synced.append(path.exists()))
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


def test_ctrl_c_while_saving_leaves_the_state_before(tmp_path, monkeypatch):
    files.save_tensors(tmp_path / "state", {"start": {}, "x": torch.ones(5)})

    def interrupted(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.save_tensors(tmp_path / "state", {"start": {}, "x": torch.zeros(5)})
    assert torch.equal(files.load_tensors(tmp_path / "state")["x"], torch.ones(5))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


# ---------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def unfinished(random_folder, tmp_path_factory):
    """A run that got SIGTERM, as a cluster sends it, in its FT stage."""
    home = tmp_path_factory.mktemp("unfinished")
    process = start(["--model", random_folder, "--epochs", "200", "--out", "run"], home)
    while not (home / "run" / "state").exists() or len(files.load_tensors(home / "run" / "state")["history"]) < 2:
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
    for changed, said in (({"lr": 1.0}, "with lr 1e-05, now it is 1.0"), ({"lr": -1}, "--lr is -1"),
                          ({"depth": 3}, "'depth' is no flag"), ({"max_train": 100}, "with max_train None, now it is 100")):
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
    monkeypatch.setattr(train, "run", lambda *a: seen.append(torch.get_num_threads()))
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


def test_a_state_of_other_weights_is_refused(unfinished, tmp_path, capsys):
    run = copy_of(unfinished, tmp_path)
    state = files.load_tensors(run / "state")
    state["start"]["data and encoder"] = "another"
    files.save_tensors(run / "state", state)
    assert "with data and encoder another" in refusal(["--resume", run], capsys)


def test_a_state_of_another_version_is_refused(unfinished, tmp_path, capsys, monkeypatch):
    run = copy_of(unfinished, tmp_path)
    version = run_folder.VERSION
    monkeypatch.setattr(run_folder, "VERSION", 0)
    assert f"was saved with version {version}, now it is 0" in refusal(["--resume", run], capsys)
    state = files.load_tensors(run / "state")  # what else differs follows from it
    state["start"]["batch_size"] = 1
    files.save_tensors(run / "state", state)
    assert f"was saved with version {version}, now it is 0" in refusal(["--resume", run], capsys)


def test_a_state_of_another_number_of_threads_is_refused(unfinished, tmp_path, capsys):
    """Sums in another order round differently: the result would not be that of an uninterrupted run."""
    run = copy_of(unfinished, tmp_path)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"threads": 2}))
    before = torch.get_num_threads()
    try:
        assert "was saved with threads 1, now it is 2" in refusal(["--resume", run], capsys)
    finally:
        torch.set_num_threads(before)


def test_a_state_of_other_texts_labels_or_weights_is_refused(random_folder, tmp_path):
    encoder, tokenizer = load_pretrained(random_folder)
    task = load_task("tiny", tokenizer, max_train=60)
    found = {run_folder.fingerprint(task, encoder)}
    task.splits["train"].labels[0] = 2 - task.splits["train"].labels[0]
    found.add(run_folder.fingerprint(task, encoder))
    task.splits["val"].ids[3] += 1
    found.add(run_folder.fingerprint(task, encoder))
    encoder.layers[-1].ffn_norm.bias.data[0] += 1e-3
    found.add(run_folder.fingerprint(task, encoder))
    assert len(found) == 4


def test_a_failure_after_the_weights_are_written_leaves_a_run_to_go_on_with(random_folder, tmp_path, monkeypatch, capsys):
    """An LP run has no state: a full disk after each file of its export, a closed pipe while it prints the table."""
    flags = ["--model", str(random_folder), "--method", "lp", "--export", str(tmp_path / "export"), "--out"]

    def broken(*some):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "export_classifier", broken)
        assert train.main([*flags, str(tmp_path / "run")]) == 1
    with monkeypatch.context() as patch:
        patch.setattr(export, "write_json",  # the export is whole, result.json is not there
                      lambda path, content: broken() if path.name == "result.json" else files.write_json(path, content))
        assert train.main(["--resume", str(tmp_path / "run")]) == 1
    assert (tmp_path / "export" / "head.safetensors").is_file()
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "result.json").is_file() and (tmp_path / "export" / "config.json").is_file()
    assert train.main(["--resume", str(tmp_path / "run")]) == 0 and "finished already" in capsys.readouterr().out

    def closed(*some):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(train, "print_table", closed)
    assert train.main([*flags[:4], "--out", str(tmp_path / "piped")]) == 1
    assert train.main(["--resume", str(tmp_path / "piped")]) == 0 and "finished already" in capsys.readouterr().out


def test_of_two_commands_that_find_a_folder_free_the_second_is_refused(random_folder, tmp_path, monkeypatch, capsys):
    """The first began between the second's look into the folder and its lock, and has ended since."""
    lock = run_folder.lock_folder

    def late(folder):
        (folder / "config.json").write_text("of the first")
        return lock(folder)

    monkeypatch.setattr(run_folder, "lock_folder", late)
    assert train.main(["--model", str(random_folder), "--method", "lp", "--out", str(tmp_path / "run")]) == 2
    assert "holds something already" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_text() == "of the first"


def test_a_run_that_was_killed_before_its_configuration_was_whole_can_be_begun_again(random_folder, tmp_path):
    """What such a kill leaves: a lock, a part of config.json, the mark in the folder of --export."""
    for folder, files_there in (("run", ("lock", "config.json.tmp")), ("export", (run_folder.UNFINISHED,))):
        (tmp_path / folder).mkdir()
        for name in files_there:
            (tmp_path / folder / name).write_text("")
    assert train.main(["--model", str(random_folder), "--method", "lp", "--out", str(tmp_path / "run"), "--export",
                       str(tmp_path / "export")]) == 0


def test_training_that_fails_at_once_leaves_nothing_that_blocks_the_corrected_command(random_folder, tmp_path, capsys):
    flags = ["--model", str(random_folder), "--max-train", "60", "--epochs", "1", "--method", "ft", "--ntk", "30",
             "--out", str(tmp_path / "run")]
    assert train.main([*flags, "--lr", "1e14"]) == 2 and "in epoch 1" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    assert train.main([*flags, "--lr", "1e-4"]) == 0
    assert train.main([*flags, "--lr", "1e-4"]) == 2  # that one is finished, so --resume is no way out
    assert capsys.readouterr().err.endswith(f"{tmp_path / 'run'}: holds something already; expected a new or empty folder\n")


def test_a_damaged_state_is_refused_wherever_it_is_damaged(unfinished, tmp_path, capsys):
    run, rng = copy_of(unfinished, tmp_path), random.Random(0)
    whole = (run / "state").read_bytes()
    for case in range(40):
        place = rng.randrange(len(whole))
        damaged = whole[:place] if case < 20 else (
            whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1:])
        (run / "state").write_bytes(damaged)
        with pytest.raises(ValueError, match="cut or damaged"):
            files.load_tensors(run / "state")
    assert "cut or damaged" in refusal(["--resume", run], capsys)
    assert (run / "state").read_bytes() == damaged  # and left for whoever wants to look


def test_code_in_a_state_is_not_run(unfinished, tmp_path, capsys):
    """With a right checksum, too: as if somebody had made the file to harm."""
    run, trap = copy_of(unfinished, tmp_path), tmp_path / "trap"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    buffer = io.BytesIO()
    torch.save({"start": {}, "lp": Trap()}, buffer)
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
    files.load_tensors(run / "state")
    assert not list(run.glob("*.tmp"))


def test_a_loss_that_is_not_finite_stops_the_run_with_the_best_weights_before(random_folder, tmp_path, capsys, monkeypatch):
    flags = ["--model", random_folder, "--max-train", "60", "--epochs", "3", "--method", "ft"]
    assert "infinite or NaN in epoch 1, at --lr 1e+14" in refusal([*flags, "--lr", "1e14", "--out", tmp_path / "a"], capsys)
    assert not (tmp_path / "a" / "model.safetensors").exists()
    train_epoch, epochs = lpft.train_epoch, []

    def breaks_in_epoch_2(model, *more):
        epochs.append(1)
        if len(epochs) == 2:
            model.head.weight.data.fill_(1e38)
        return train_epoch(model, *more)

    monkeypatch.setattr(lpft, "train_epoch", breaks_in_epoch_2)
    err = refusal([*flags, "--out", tmp_path / "b"], capsys)
    assert "in epoch 2" in err and f"the best weights before are in {tmp_path / 'b'}" in err
    model, _, _ = load_classifier(tmp_path / "b")
    assert float(model.head.weight.detach().abs().max()) < 1
    assert len(files.load_tensors(tmp_path / "b" / "state")["history"]) == 2  # no state of the ruined epoch


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")])
def test_memory_that_runs_out_is_one_line_with_what_to_lower(random_folder, tmp_path, capsys, monkeypatch, error):
    def full(*arguments, **more):
        raise error

    monkeypatch.setattr(train, "fine_tune", full)
    assert train.main(["--model", str(random_folder), "--method", "ft", "--out", str(tmp_path / "run")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "train.py: error: out of memory; lower --max-length, --max-train, --ntk or --batch-size"
    assert not (tmp_path / "run").exists()  # the same command, corrected, finds it free


def test_other_runtime_errors_are_not_called_memory(random_folder, tmp_path, monkeypatch):
    def broken(*arguments, **more):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train, "fine_tune", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        train.main(["--model", str(random_folder), "--method", "ft", "--out", str(tmp_path / "run")])


def test_a_full_disk_at_the_end_of_lp_leaves_the_folder_free(random_folder, tmp_path, capsys, monkeypatch):
    """logits.npz is written before the weights; alone in the folder, it would refuse the same command."""
    def full(*arguments):
        raise OSError(28, "No space left on device")

    command = ["--model", str(random_folder), "--method", "lp", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(export, "write_safetensors", full)
        assert train.main(command) == 1
    assert train.main(command) == 0


def test_predict_says_what_to_lower_too(random_folder, tmp_path, capsys, monkeypatch):
    def full(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    assert train.main(["--model", str(random_folder), "--method", "lp", "--out", str(tmp_path / "run")]) == 0
    (tmp_path / "texts").write_text("good\n")
    monkeypatch.setattr(predict_command, "predict", full)
    assert predict_command.main([str(tmp_path / "run"), str(tmp_path / "texts")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "predict.py: error: out of memory; lower --batch-size"


def test_what_json_has_no_word_for_is_null_wherever_it_stands(tmp_path):
    files.write_json(tmp_path / "x", {"a": math.nan, "b": [1.5, [math.inf, -math.inf]], "c": {"d": math.nan}})
    assert json.loads((tmp_path / "x").read_text(), parse_constant=pytest.fail) == {
        "a": None, "b": [1.5, [None, None]], "c": {"d": None}}
