"""What keeps the kernel exact: a model that fits, full precision, short sums, a comparison with autograd."""

import sys
from contextlib import contextmanager
from itertools import compress

import torch
import torch.nn as nn
from tqdm import tqdm

MAX_COLUMNS = 2**15, 2**17  # terms of one sum in the model's precision: on a CPU, on CUDA
ROWS = 64, 128  # of one product, the fastest: on a CPU, on CUDA


def add_gram(kernel, J):
    """kernel (R r, N r) += J J[:N r]^T, the lower triangle, J (R r, columns).

    The kernel is float64, and J comes in chunks: one float32 sum over all columns loses two digits.
    """
    rows, step = kernel.shape[1], ROWS[J.is_cuda]
    for chunk in J.split(MAX_COLUMNS[J.is_cuda], 1):
        chunk = chunk if rows >= 64 else chunk.to(kernel)  # float32 products of few rows are less exact
        for start in range(0, max(rows - step + 1, 1), step):
            stop = start + step if rows - start >= 2 * step else len(chunk)  # the test rows go with the last
            kernel[start:stop, :stop] += (chunk[start:stop] @ chunk[:min(stop, rows)].T).to(kernel.device)


@contextmanager
def full_precision():
    """No TF32 or bfloat16 inside float32 products."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def check_exactness(model, *batch_lists):
    """ValueError for what would make the kernel inexact."""
    head, owner, wrong = model.head, {}, []
    if not batch_lists[0] or any(isinstance(batches, dict) for batches in batch_lists):
        wrong.append("expected lists of batches, and at least one training batch")
    if torch.is_autocast_enabled(head.weight.device.type) or torch.is_inference_mode_enabled():
        wrong.append("needs full precision and gradients; leave torch.autocast and torch.inference_mode")
    if type(head) is not nn.Linear or len([p for p in head.parameters() if p.requires_grad]) < 2:
        wrong.append("the head is not a Linear with a bias that trains, of which P (Prop. 4.1) is the kernel")
    if head.weight.dtype not in (torch.float32, torch.float64):
        wrong.append(f"the model is in {head.weight.dtype}; expected float32 or float64")
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad and owner.setdefault(p, name) != name:
            wrong.append(f"{name} is the same tensor as {owner[p]}; shared parameters are not supported")
    for name, module in model.named_modules():
        name, known = name or "the model", type(module) in (nn.Linear, nn.LayerNorm, nn.Embedding)
        if module.training:
            wrong.append(f"{name} is in training mode, where dropout is random; call model.eval() first")
        if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq):
            wrong.append(f"{name} rescales its rows or gradients (max_norm, scale_grad_by_freq)")
        for key, p in module.named_parameters(recurse=False):
            if p.requires_grad and not (known and key in ("weight", "bias")):
                wrong.append(f"{name} ({type(module).__name__}) owns the parameter {key}; expected only "
                             "weight and bias of Linear, LayerNorm and Embedding")
    if wrong:
        raise ValueError(f"NTK: {wrong[0]}")


def print_size(model, layers, batches, N, r):
    """N, C, r, p, and about how much memory it takes beside one batch's activations; layers of each block."""
    C, h = model.head.weight.shape
    R = sum(len(b["input_ids"]) for b in batches)
    size = sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)
    widest = max(sum(m.weight.shape[1] + r * m.weight.shape[0] for m in some if isinstance(m, nn.Linear))
                 for some in layers)  # a and g of one block, for one token
    floats = sum(b["input_ids"].numel() for b in batches) * (widest + h * (len(layers) + r))
    memory = floats * model.head.weight.element_size() + 24 * R * N * C**2
    tqdm.write(f"NTK   N = {N} training and {R - N} test samples, C = {C}, V of rank {r}, p = {size:,} in "
               f"the encoder; about {memory / 2**20:,.0f} MB", file=sys.stdout)


def spot_check(model, batches, N, pretrain, ft):
    """Compare six entries of P and of F (R, C, N, C) with autograd; ArithmeticError where they differ.

    Each by itself, against its own diagonal: where P is large, Theta would hide an error of F.
    """
    samples = [{name: t[n:n + 1] for name, t in batch.items()} for batch in batches
               for n in range(len(batch["input_ids"]))]
    n, c = [0, N - 1, len(ft) - 1], [0, ft.shape[1] - 1, 0]  # three samples, two of training; a logit of each
    names, trained = zip(*[(name, p) for name, p in model.named_parameters() if p.requires_grad])
    with torch.enable_grad():
        gradients = [torch.autograd.grad(model(**samples[i])[0, k], trained, materialize_grads=True)
                     for i, k in zip(n, c)]
    for part, kernel in (("P", pretrain), ("F", ft)):
        own = [name.startswith("head.") == (part == "P") for name in names]
        expected = torch.tensor([[sum(float((x * y).sum()) for x, y in compress(zip(one, other), own))
                                  for one in gradients] for other in gradients], dtype=torch.double)  # (3, 3)
        scale = expected.diagonal().sqrt().clamp(min=1e-300)
        error = (kernel[n, c][:, n[:2], c[:2]] - expected[:, :2]).abs() / scale[:, None] / scale[:2]
        if not error.max() <= (1e-4 if model.head.weight.dtype == torch.float32 else 1e-9):
            raise ArithmeticError(
                f"NTK: the spot check failed: {part} and autograd differ by {float(error.max()):.2g} of the "
                "diagonal. Does the model use a parameter outside its layer, or one sample see another?")
