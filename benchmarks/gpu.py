"""CUDA measured on one card: is it correct, how fast is training, the kernel, prediction. One table.

    python benchmarks/gpu.py             at most 8 minutes on an H100; exit status 1 if a check fails
    python benchmarks/gpu.py --smoke     the same code on the CPU, with tiny sizes: does it run at all?

No network and no checkpoint: the tiny encoder, and random weights of RoBERTa-base's shape. A row is a check
(ok or FAILED) or has a goal (met or missed) or neither. Peers run in this process with the same settings:
the transformers Trainer and peft, a torch.func contraction, a transformers loop. Times are medians.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import lpft
from lab import pretrain
from data import Split, Task, tiny
from plumbing import devices
from plumbing.exact import add_gram
from plumbing.export import export_classifier, save_classifier
from model import Classifier, Encoder, EncoderConfig, add_lora
from ntk import empirical_ntk
from ntk_vs_torch_func import cut, make_samples, torch_func
from predict_vs_transformers import by_predict, by_transformers
from train_vs_transformers import Clock, FirstTokenClassifier, FixedBatches, one_sample

ROBERTA_BASE = dict(vocab_size=50265, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                    intermediate_size=3072, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1,
                    layer_norm_eps=1e-5, model_type="roberta")
SMOKE = ROBERTA_BASE | dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                            intermediate_size=64, max_position_embeddings=130)
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, data sheets of the SXM cards, in FLOP/s
ROWS = []  # (what, measured, verdict)


def row(what, measured, check=None, goal=None):
    """Print and keep one row; `check` and `goal` say whether it holds."""
    verdict = ("" if check is None else "ok" if check else "FAILED") or (
        "" if goal is None else "goal met" if goal else "goal missed")
    ROWS.append((what, measured, verdict))
    print(f"  {what:<58s} {measured:<52s} {verdict}", flush=True)


def relative(found, expected):
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).norm() / expected.norm())


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device, run, repeats=1):
    """(median seconds, peak bytes above the start, last result)."""
    times, memory = [], 0
    for _ in range(repeats):
        wait(device)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
        begin = time.perf_counter()
        result = run()
        wait(device)
        times.append(time.perf_counter() - begin)
        if device == "cuda":
            memory = torch.cuda.max_memory_allocated() - start
    return statistics.median(times), memory, result


def product_rate(device, dtype, size):
    """FLOP/s of one large matrix product on random numbers."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    seconds, _, _ = timed(device, lambda: [a @ b for _ in range(10)], 3)
    return 10 * 2 * size**3 / seconds


# ---------------------------------------------------------------------------- 1. correctness


def correctness(device, smoke, folder):
    tests = None
    if device == "cuda":
        tests = subprocess.Popen([sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"], cwd=ROOT,
                                 stdout=subprocess.PIPE, text=True)
    torch.manual_seed(0)
    model = Classifier(Encoder(EncoderConfig(**SMOKE)), 3).eval()
    split = random_split(64, 32, 300)
    features, logits = lpft.predict(model, split)
    found_features, found_logits = lpft.predict(model.to(device), split)
    row("features, against the CPU (below 1e-4)", f"{relative(found_features, features):.1e}",
        check=relative(found_features, features) < 1e-4)
    expected, found = (lpft.fit_linear_probe(x, split.labels, 3, 1.0).weight for x in (features, features.to(device)))
    row("LP from the same features (below 1e-6)", f"{relative(found, expected):.1e}",
        check=relative(found, expected) < 1e-6)
    expected, found = (lpft.fit_temperature(x * 50, split.labels) for x in (logits, found_logits))
    row("temperature (below 1e-4)", f"{abs(found / expected - 1):.1e}", check=abs(found / expected - 1) < 1e-4)
    samples = make_samples(12, 24, 300)
    expected = empirical_ntk(model.double().cpu(), cut(samples, 4)).ft
    found = empirical_ntk(model.float().to(device), cut(samples, 4)).ft
    row("kernel in float32, against float64 on the CPU (below 1e-5)", f"{relative(found, expected):.1e}",
        check=relative(found, expected) < 1e-5)
    main_job(device, smoke, folder)
    if tests:
        output, _ = tests.communicate()
        print(output[-3000:])
        row("pytest -m cuda", output.strip().splitlines()[-1][:50], check=tests.returncode == 0)


def main_job(device, smoke, folder):
    """train.py on the device, against the CPU, and after a SIGKILL.

    Dropout draws other numbers on a GPU, so its run is as another seed's: means over seeds are compared.
    """
    quick = ["--model", str(random_encoder(folder)), "--lr", "1e-3", "--batch-size", "16", "--max-train", "60",
             "--max-test", "40", "--epochs", "3"]
    command = [sys.executable, "train.py", "--method", "lpft", "--lora"] + (quick if smoke else [])
    environment = os.environ | {"OMP_NUM_THREADS": "1" if smoke else "2"}

    def start(out, *flags):
        return subprocess.Popen([*command, "--out", str(out), *flags], cwd=ROOT, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL, env=environment)

    seeds = range(1 if smoke else 5)
    runs = [start(folder / f"{where}{seed}", "--device", where, "--seed", str(seed))
            for seed in seeds for where in dict.fromkeys(("cpu", device))]
    killed = start(folder / "killed", "--device", device, "--epochs", "12")
    log = folder / "killed" / "metrics.jsonl"
    while killed.poll() is None and not (log.is_file() and log.read_text().count('"ft"') > 3):
        time.sleep(0.02)
    was_running = killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    failed = sum(run.wait() != 0 for run in runs)
    row("main job: runs that failed", f"{failed} of {len(runs)}", check=failed == 0)
    cpu, found = (accuracies(folder, where, seeds) for where in ("cpu", device))  # {split: (seeds,)}
    for split in cpu:
        gap = found[split] - cpu[split]
        error = gap.std(ddof=1) / len(gap)**0.5 if len(gap) > 1 else 0.0
        row(f"main job, {split}: accuracy less the CPU's (2 points, or 2 standard errors)",
            f"{100 * gap.mean():+.1f} points, standard error {100 * error:.1f}",
            check=abs(gap.mean()) <= max(0.02, 2 * error))
    done = subprocess.run([sys.executable, "train.py", "--resume", str(folder / "killed")], cwd=ROOT,
                          capture_output=True, text=True)
    epochs = log.read_text().count('"ft"')
    row("resume after SIGKILL", f"status {done.returncode}, epochs 0 to {epochs - 1}",
        check=was_running and done.returncode == 0 and epochs == 13)


def accuracies(folder, where, seeds):
    results = [json.loads((folder / f"{where}{seed}" / "result.json").read_text())["accuracy"] for seed in seeds]
    return {split: np.array([result[split] for result in results]) for split in results[0]}


def random_encoder(folder):
    """A checkpoint folder of the tiny architecture with random weights."""
    from plumbing.checkpoint import save_pretrained

    save_pretrained(folder / "encoder", Encoder(pretrain.tiny_config()), tiny.make_tokenizer())
    return folder / "encoder"


def random_split(count, length, words, full=True):
    """Random token ids; texts as long as real ones (median a third of `length`) or all of `length`."""
    rng = np.random.default_rng(0)
    lengths = np.full(count, length) if full else np.clip(rng.lognormal(np.log(length / 3), 0.6, count), 8, length)
    return Split([(rng.integers(5, words, int(n)).tolist(), [0] * int(n), i % 3) for i, n in enumerate(lengths)], 1)


# ---------------------------------------------------------------------------- 2. training


def training(device, smoke, folder):
    config = EncoderConfig(**(SMOKE if smoke else ROBERTA_BASE))
    batch_size, length, steps, epochs = (4, 16, 3, 2) if smoke else (32, 128, 24, 4)
    rate = product_rate(device, torch.bfloat16, 256 if smoke else 8192)
    peak = next((p for card, p in PEAKS.items() if card in device_name(device)), rate)
    row("bf16 product of 8192 x 8192 matrices", f"{rate / 1e12:.3g} TFLOP/s; data sheet {peak / 1e12:.3g}")
    for lora in (False, True):
        for full in (False, True):
            split = random_split(steps * batch_size, length, config.vocab_size, full)
            name = f"{'LoRA' if lora else 'FT'}, batch {batch_size}, {'full' if full else 'padded'} lengths of {length}"
            ours, model, syncs = our_training(config, split, lora, batch_size, epochs, device)
            theirs = trainer(config, split, lora, batch_size, epochs, device, folder)
            row(f"{name}: steps/s, Trainer's", f"{steps / ours:.1f}, {steps / theirs:.1f}; ratio {theirs / ours:.2f}",
                goal=None if smoke else theirs / ours >= 1.2)
            row(f"{name}: host waits per step", f"{syncs / steps / epochs:.2f}", goal=syncs <= 3 * epochs)
            if full:
                flops = step_flops(model, split, batch_size, device)
                share = flops * steps / ours / peak
                row(f"{name}: TFLOP a step, share of the peak", f"{flops / 1e12:.2f}, {100 * share:.0f} %",
                    goal=None if smoke or lora else share >= 0.4)
                if device == "cuda":
                    profile_steps(model, split, batch_size, device)


def our_training(config, split, lora, batch_size, epochs, device):
    """(median seconds of an epoch, the model, how often the host waited for the device in train_epoch)."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Classifier(Encoder(config), 3)
    if lora:
        add_lora(model.encoder)
    times, syncs, train_epoch = [], [], lpft.train_epoch

    def watched(*arguments):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                return train_epoch(*arguments)
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
                syncs.extend(w for w in caught if "synchroniz" in str(w.message))

    def on_epoch(record):
        wait(device)
        times.append(time.perf_counter())

    lpft.train_epoch = watched
    try:
        lpft.fine_tune(model, split, one_sample(split), lr=1e-5, batch_size=batch_size, epochs=epochs,
                       on_epoch=on_epoch)
    finally:
        lpft.train_epoch = train_epoch
    seconds = [after - before for before, after in zip(times[1:], times[2:])]  # the first epoch warms up
    return statistics.median(seconds), model, len(syncs)


class DeviceClock(Clock):
    """Seconds of each epoch of the Trainer, with the device's work done."""

    def __init__(self, device):
        self.device, self.seconds = device, []

    def on_epoch_end(self, *args, **kwargs):
        wait(self.device)
        self.seconds.append(time.perf_counter() - self.begin)


class PinnedBatches(FixedBatches):
    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        return torch.utils.data.DataLoader(loader.dataset, batch_size=None, pin_memory=torch.cuda.is_available())


def trainer(config, split, lora, batch_size, epochs, device, folder):
    """Median seconds of an epoch of the transformers Trainer, with peft for LoRA."""
    torch.manual_seed(0)
    theirs = transformers.RobertaConfig(**{name: value for name, value in vars(config).items() if name != "model_type"})
    theirs._attn_implementation = "sdpa"
    with torch.device(device):
        model = FirstTokenClassifier(transformers.RobertaModel(theirs, add_pooling_layer=False), 3, lora)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), num_train_epochs=epochs, per_device_train_batch_size=batch_size,
        learning_rate=1e-5, weight_decay=0.0, lr_scheduler_type="linear", warmup_steps=0, max_grad_norm=1.0,
        save_strategy="no", report_to=[], logging_strategy="no", bf16=device == "cuda", use_cpu=device == "cpu",
        disable_tqdm=True)
    clock = DeviceClock(device)
    PinnedBatches(model=model, args=arguments, train_dataset=split, callbacks=[clock]).train()
    return statistics.median(clock.seconds[1:])


def first_batch(split, batch_size, device):
    batch, labels = split.batch(range(batch_size))
    return {name: t.to(device) for name, t in batch.items()}, labels.to(device)


def one_step(model, batch, labels, device):
    with devices.mixed_precision(torch.device(device)):
        logits = model.train()(**batch)
    torch.nn.functional.cross_entropy(logits.float(), labels).backward()


def step_flops(model, split, batch_size, device):
    with FlopCounterMode(display=False) as counter:
        one_step(model, *first_batch(split, batch_size, device), device)
    return counter.get_total_flops()


def profile_steps(model, split, batch_size, device):
    """Where a step's time goes: the share of it in which the card works, and the longest kernels."""
    batch, labels = first_batch(split, batch_size, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)

    def step():
        optimizer.zero_grad()
        one_step(model, batch, labels, device)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    for _ in range(3):
        step()
    alone, _, _ = timed(device, lambda: [step() for _ in range(10)])
    busy, kernels = longest_kernels(lambda: [step() for _ in range(5)], 5)
    row("    one step without data or bookkeeping: ms, ms of kernels", f"{100 * alone:.1f}, {busy:.1f}; "
        f"{kernels:.0f} kernels")


def longest_kernels(run, per=1):
    """Print the kernels that take longest; returns (milliseconds, number) of all, divided by `per`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    for e in sorted(events, key=lambda e: -e.self_device_time_total)[:7]:
        print(f"      {e.self_device_time_total / 1e3 / per:8.2f} ms  {e.count / per:6.0f} x  {e.key[:90]}")
    return sum(e.self_device_time_total for e in events) / 1e3 / per, sum(e.count for e in events) / per


# ---------------------------------------------------------------------------- 3. the kernel


def kernel(device, smoke, folder):
    config = EncoderConfig(**(SMOKE if smoke else ROBERTA_BASE))
    N, length, size, C = (12, 16, 6, 3) if smoke else (250, 128, 25, 3)
    rate = product_rate(device, torch.float32, 256 if smoke else 8192)
    row("float32 product of 8192 x 8192 matrices", f"{rate / 1e12:.3g} TFLOP/s")
    torch.manual_seed(0)
    with torch.device(device):
        model = Classifier(Encoder(config), C).eval()
    split = random_split(N, length, config.vocab_size)
    batches = [split.batch(range(start, min(start + size, N)))[0] for start in range(0, N, size)]
    linear = sum(m.weight.numel() for m in model.encoder.modules() if isinstance(m, torch.nn.Linear))
    tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    empirical_ntk(model, [split.batch(range(4))[0]])  # warm-up
    for head, r, seconds_goal in (("random", C, 5.0), ("LP-like", C - 1, 3.0)):
        if head == "LP-like":  # LP's rows sum to zero
            with torch.no_grad():
                model.head.weight -= model.head.weight.mean(0)
        seconds, memory, found = timed(device, lambda: empirical_ntk(model, batches))
        exact_seconds, exact_memory, exact = timed(device, lambda: empirical_ntk(model.double(), batches))
        model.float()
        worst = float((found.ft - exact.ft).abs().max() / exact.ft.abs().max())
        floor = ((N * r)**2 * linear + 2 * tokens * r * linear + 2 * tokens * linear * (1 + r)) / rate
        row(f"kernel, N = {N}, {head} head: seconds, peak GB", f"{seconds:.2f}, {memory / 1e9:.1f}",
            goal=None if smoke else seconds <= seconds_goal)
        row(f"kernel, {head} head: times the floor of {floor:.2f} s", f"{seconds / floor:.2f}")
        row(f"kernel, {head} head: worst error over the largest entry", f"{worst:.1e}", goal=worst < 1e-6)
        if head == "random":
            row("kernel, all in float64: seconds, peak GB", f"{exact_seconds:.2f}, {exact_memory / 1e9:.1f}")
            if device == "cuda":
                longest_kernels(lambda: empirical_ntk(model, batches))
    against_torch_func(model, N, length, device, smoke)
    products(device, N * C, 2**10 if smoke else 2**18)


def against_torch_func(model, N, length, device, smoke):
    """Jacobian contraction with the largest N whose Jacobians fit, and ours with the same samples."""
    for count in (8,) if smoke else (40, 32, 24, 16, 8):
        samples = make_samples(count, length, 280)
        try:
            theirs, memory, expected = timed(device, lambda: torch_func(model, to(samples, device), 2))
        except torch.OutOfMemoryError:
            continue
        ours, our_memory, found = timed(device, lambda: empirical_ntk(model, cut(samples, 8)))
        row(f"torch.func contraction, N = {count}: seconds, peak GB", f"{theirs:.2f}, {memory / 1e9:.1f}")
        row(f"kernel, N = {count}: seconds, peak GB, times faster, difference",
            f"{ours:.2f}, {our_memory / 1e9:.1f}, {theirs / ours:.2f}, {relative(found.ft, expected):.0e}",
            check=relative(found.ft, expected) < 1e-4)
        return


def to(batch, device):
    return {name: t.to(device) for name, t in batch.items()}


def products(device, rows, columns):
    """J J^T in float32, in float64, and from three TF32 products of J's high and low halves."""
    torch.manual_seed(0)
    J = torch.randn(rows, columns, device=device)
    exact = J.double() @ J.double().T

    def three_tf32():
        high = (J.view(torch.int32) & ~0x1FFF).view(torch.float32)  # the 10 bits of mantissa that TF32 keeps
        low = J - high
        torch.set_float32_matmul_precision("high")
        try:
            cross = high @ low.T
            return high @ high.T + cross + cross.T
        finally:
            torch.set_float32_matmul_precision("highest")

    def as_in_ntk():
        kernel = exact.new_zeros(rows, rows)
        add_gram(kernel, J)
        return kernel.tril() + kernel.tril(-1).T

    for name, run in (("float32", lambda: J @ J.T), ("float32, exact.add_gram", as_in_ntk), ("float64", lambda: J.double() @ J.double().T),
                      ("3 x TF32", three_tf32)):
        run()
        seconds, _, found = timed(device, run, 5)
        row(f"J J^T, J {rows} x {columns}, {name}: ms, worst relative error",
            f"{1e3 * seconds:.2f}, {float((found.to(device) - exact).abs().max() / exact.abs().max()):.1e}")


# ---------------------------------------------------------------------------- 4. prediction


def prediction(device, smoke, folder):
    count = 40 if smoke else 20_000
    sizes = (SMOKE if smoke else ROBERTA_BASE) | dict(model_type="bert", pad_token_id=0, type_vocab_size=2)
    tokenizer, texts = tiny.make_tokenizer(), tiny.Language(1).documents(count)
    torch.manual_seed(0)
    model, task = Classifier(Encoder(EncoderConfig(**sizes)), 2).eval(), Task({}, ["no", "yes"])
    (folder / "run").mkdir()
    save_classifier(folder / "run", model, tokenizer, task, 1.0, 64, "texts")
    export_classifier(folder / "export", model, tokenizer, task, 1.0, 64, "random weights")
    (folder / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    ours, _, found = timed(device, by_predict(folder / "run", folder / "texts.txt", device))
    theirs, _, expected = timed(device, by_transformers(folder / "export", texts, device))
    row("predict.py: texts/s, a transformers loop's", f"{count / ours:.0f}, {count / theirs:.0f}; "
        f"ratio {theirs / ours:.2f}")
    row("predict.py: largest difference of a probability (below 1e-4)", f"{(found - expected).abs().max():.1e}",
        check=float((found - expected).abs().max()) < 1e-4)
    if device == "cuda":
        small = ("import sys, torch; torch.cuda.set_per_process_memory_fraction(0.004); import train; "
                 "sys.exit(train.main(sys.argv[1:]))")
        done = subprocess.run([sys.executable, "-c", small, "--model", str(folder / "export"), "--method", "ft",
                               "--device", "cuda", "--out", str(folder / "full")], cwd=ROOT, capture_output=True, text=True)
        last = done.stderr.strip().splitlines()[-1]
        row("train.py, out of memory", last[:52], check=done.returncode == 1 and "lower" in last)


# ---------------------------------------------------------------------------- the command


def device_name(device):
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on the CPU")
    parts = {"correctness": correctness, "training": training, "kernel": kernel, "prediction": prediction}
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    args = parser.parse_args(argv)
    if not args.smoke and not torch.cuda.is_available():
        parser.error("this PyTorch finds no CUDA device; --smoke runs the same code on the CPU")
    device = "cpu" if args.smoke else "cuda"
    transformers.utils.logging.set_verbosity_error()
    print(f"{device_name(device)}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{time.strftime('%Y-%m-%d')}")
    begin = time.perf_counter()
    for name in args.only:
        print(f"\n{name}, after {time.perf_counter() - begin:.0f} s", flush=True)
        try:
            with tempfile.TemporaryDirectory() as folder:
                parts[name](device, args.smoke, Path(folder))
        except Exception:  # the other parts are worth having
            traceback.print_exc(file=sys.stdout)
            row(name, "ended by the error above", check=False)
        if device == "cuda":
            torch.cuda.empty_cache()
    print(f"\nall of it: {time.perf_counter() - begin:.0f} s")
    for what, measured, verdict in ROWS:
        print(f"| {what} | {measured} | {verdict} |")
    return int(any(verdict == "FAILED" for *_, verdict in ROWS))


if __name__ == "__main__":
    sys.exit(main())
