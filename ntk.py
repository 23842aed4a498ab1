"""The exact empirical neural tangent kernel of a classifier, and what the paper measures on it.

    Theta(x, x') = (df(x)/dtheta) (df(x')/dtheta)^T  =  P(x, x') + F(x, x')           Prop. 4.1
    P = (<phi(x), phi(x')> + 1) I_C                        the head's part, NTK.pretrain
    F = V (dphi(x)/dtheta_phi) (dphi(x')/dtheta_phi)^T V^T    the encoder's part, NTK.ft

over the parameters that require a gradient, at their present values, dropout off. Read in order:
ntk_by_jacobian is the definition in twenty lines; empirical_ntk computes the same numbers for a real
encoder in bounded memory; the statistics at the end are Table 2 of the paper.

Shapes: N training samples, M test samples, R = N + M, L tokens, C classes, h width, p parameters;
in and out are the widths of one layer. A kernel is (N, C, N, C), the paper's NC x NC matrix once
reshaped; test kernels are (M, C, N, C).
"""

import sys
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, jacrev, vmap
from tqdm import tqdm

from linear_probe import fit_linear_probe, stratified_folds

MAX_COLUMNS = {False: 2**15, True: 2**17}  # terms in one float32 product, or one row: on a CPU, on CUDA


@dataclass
class NTK:
    """P and F of Prop. 4.1 on training pairs, and of test against training samples; float64, CPU."""

    pretrain: torch.Tensor  # P, (N, C, N, C)
    ft: torch.Tensor  # F, (N, C, N, C)
    test_pretrain: torch.Tensor | None = None  # P, (M, C, N, C)
    test_ft: torch.Tensor | None = None  # F, (M, C, N, C)


# ---------------------------------------------------------------------------- the definition


def ntk_by_jacobian(model, train_batches, test_batches=None):
    """Theta as Prop. 4.1 defines it: Jacobians of single samples, multiplied. Holds (N + M) C p floats.

    Batches are iterables of dicts {input_ids, attention_mask, token_type_ids}, each (n, L).
    """
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def logits(trained, sample):  # of one sample: (C,)
        return functional_call(model, trained, (), {k: t.unsqueeze(0) for k, t in sample.items()})[0]

    def jacobians(batches):  # {name: (N, C, parameters of this name)}
        parts = [vmap(jacrev(logits), in_dims=(None, 0))(trained, batch) for batch in batches]
        return {name: torch.cat([part[name].flatten(2) for part in parts]) for name in trained}

    def contract(rows, columns, of_head):
        total = 0.0
        for name in trained:
            if name.startswith("head.") == of_head:
                total = total + torch.einsum("ncp,mdp->ncmd", rows[name], columns[name]).double().cpu()
        if isinstance(total, float):  # nothing of this part trains
            (n, c), m = rows["head.bias"].shape[:2], len(columns["head.bias"])
            return torch.zeros(n, c, m, c, dtype=torch.double)
        return total  # (N or M, C, N, C)

    train = jacobians(train_batches)
    test = jacobians(test_batches) if test_batches else None
    return NTK(contract(train, train, True), contract(train, train, False),
               contract(test, train, True) if test else None,
               contract(test, train, False) if test else None)


# ---------------------------------------------------------------------------- the engine


def empirical_ntk(model, train_batches, test_batches=None, memory_budget=2**31, state=None):
    """The same kernel, layer by layer, without ever holding a Jacobian of the whole model.

    F is a sum over layers, F = sum_l J_l J_l^T, and J_l, (R C, parameters of l), needs only what the
    layer saw and what came back to it: its input a (n, T, in) at T positions and, for each of the
    C logits, the gradient g (n, C, T, out) of its output. So layers are taken in groups whose a and
    g fit into three quarters of `memory_budget` (bytes), each group with one forward and C backward
    passes over all batches. A layer too large for that is taken in slices of its output features. On
    top come the activations of one batch with their C gradients, and the kernel, four times at the
    end. Products are in the model's precision with MAX_COLUMNS terms, their sum is in float64: a
    float32 sum loses two digits. With a resume.StateFile as `state`, the sum is saved in it after every
    group but the last, and gone on with if it is there.

    Raises ValueError where the result would not be exact (see trainable_layers) or the budget is
    too small, ArithmeticError if entries computed by autograd differ (see spot_check).
    """
    layers, memory_budget = trainable_layers(model), int(memory_budget)
    if isinstance(train_batches, dict) or isinstance(test_batches, dict):
        raise ValueError("NTK: expected a list of batches, found one batch")
    device, num_classes = model.head.weight.device, model.head.out_features
    train, test = ([{name: t.to(device) for name, t in batch.items()} for batch in batches or ()]
                   for batches in (train_batches, test_batches))
    if not train:
        raise ValueError("NTK: no training batches")
    N, R = (sum(len(b["input_ids"]) for b in some) for some in (train, train + test))
    item_size = model.head.weight.element_size()
    groups = group_pieces(layers, train + test, num_classes, memory_budget, item_size)
    columns = chunk_columns(layers, R * num_classes * item_size, memory_budget, device)
    size = sum(p.numel() for layer in layers.values() for p in layer.parameters(recurse=False)
               if p.requires_grad)
    tqdm.write(f"NTK   N = {N} training and {R - N} test samples, C = {num_classes}, p = {size:,} in the "
               f"encoder; at most {memory_budget / 2**20:,.0f} MB beside the kernel of "
               f"{8e-6 * R * N * num_classes**2:,.0f} MB; passes: {len(groups)}", file=sys.stdout)
    # MPS has no float64
    kernel = torch.zeros(R * num_classes, N * num_classes, dtype=torch.double,
                         device="cpu" if device.type == "mps" else device)
    # Every chunk of J goes into the same memory: fresh memory for each costs more than its product.
    workspace = model.head.weight.new_empty(R * num_classes * columns)
    gram = Gram(kernel, columns)
    with full_precision(), frozen(model) as trained, tqdm(total=size, desc="NTK", unit="parameter",
                                                          unit_scale=True, mininterval=1.0) as bar:
        done = 0
        if state and "ntk_groups" in state.parts:
            found = state.parts.pop("ntk_groups")
            done = found["done"]
            kernel.copy_(found["kernel"])
        for number, group in enumerate(groups):
            if number >= done:
                features, stored = inputs_and_gradients(model, train + test, group, num_classes)  # (R, h)
            for layer, start, stop in group:
                inputs, gradients = stored.pop(layer) if number >= done else ((), ())
                if inputs:
                    add_layer(gram, layer, trained[layer], inputs, gradients, start, stop, workspace)
                bar.update(sum(p.numel() * (stop - start) // out_features(layer)
                               for p in trained[layer].values()))
            gram.add_waiting()
            if state and done <= number < len(groups) - 1:
                state.save(ntk_groups={"done": number + 1, "kernel": kernel})
    square = kernel[:len(kernel[0])].tril()  # the Gram products filled the lower triangle alone
    kernel = torch.cat([square + square.tril(-1).T, kernel[len(square):]]).cpu()
    kernel_ft = kernel.unflatten(1, (N, num_classes)).unflatten(0, (R, num_classes))  # (R, C, N, C)
    features = features.cpu().double()
    products = features @ features[:N].T + 1  # (R, N)
    eye = torch.eye(num_classes, dtype=torch.double)
    kernel_pretrain = torch.einsum("rn,cd->rcnd", products, eye)  # P of Prop. 4.1, (R, C, N, C)
    with full_precision():
        spot_check(model, train + test, N, kernel_pretrain, kernel_ft, memory_budget)
    return NTK(kernel_pretrain[:N], kernel_ft[:N], kernel_pretrain[N:] if test else None,
               kernel_ft[N:] if test else None)


def trainable_layers(model):
    """{name: module} of the encoder's layers that train; ValueError for what would not be exact."""
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"NTK: {training[0]} is in training mode, where dropout is random; call "
                         "model.eval() first")
    if torch.is_autocast_enabled(model.head.weight.device.type) or torch.is_inference_mode_enabled():
        raise ValueError("NTK: needs full precision and gradients; leave torch.autocast and "
                         "torch.inference_mode")
    if not isinstance(model.head, nn.Linear) or model.head.bias is None or not all(
            p.requires_grad for p in model.head.parameters()):
        raise ValueError("NTK: the head is not a Linear with a bias that trains, of which P of Prop. 4.1 is the "
                         "kernel")
    if model.head.weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"NTK: the model is in {model.head.weight.dtype}; expected float32 or float64")
    first_name = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad and first_name.setdefault(p, name) != name:
            raise ValueError(f"NTK: {name} is the same tensor as {first_name[p]}; parameters that several "
                             "modules share are not supported")
    layers = {}
    for name, module in model.named_modules():
        own = [key for key, p in module.named_parameters(recurse=False) if p.requires_grad]
        if module is model.head:
            continue
        known = type(module) in (nn.Linear, nn.LayerNorm, nn.Embedding)
        unknown = [key for key in own if not known or key not in ("weight", "bias")]
        if unknown:
            raise ValueError(f"NTK: {name or 'the model'} ({type(module).__name__}) owns the parameter "
                             f"{unknown[0]}; known are weight and bias of Linear, LayerNorm and Embedding")
        if own and isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq):
            raise ValueError(f"NTK: {name} rescales its rows or gradients (max_norm, scale_grad_by_freq)")
        if own and isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            raise ValueError(f"NTK: {name} normalises over more than the last dimension")
        if own:
            layers[name] = module
    return layers


def out_features(layer):
    """The width of a layer's output."""
    return layer.weight.shape[0] if isinstance(layer, nn.Linear) else layer.weight.shape[-1]


def group_pieces(layers, batches, num_classes, budget, item_size):
    """[[(layer, start, stop), ...], ...]: slices of output features, a and g within 3/4 of the budget."""
    positions = sum(batch["input_ids"].numel() for batch in batches)
    groups, free = [], 0
    for name, layer in layers.items():
        stop, out = 0, out_features(layer)
        inputs, copies = layer.weight.shape[-1], 1
        if isinstance(layer, nn.Embedding):
            inputs, copies = 2, 4  # ids are 64 bits; add_embedding sorts g three times into new order
        while stop < out:
            start, fixed = stop, positions * inputs * item_size
            each = copies * positions * num_classes * item_size
            if fixed + each * (out - start) > free:  # does not fit into what is left of this group
                groups.append([])
                free = budget * 3 // 4
            if fixed + each > free:
                raise ValueError(f"NTK: a memory budget of {budget / 2**20:,.0f} MB is too small for "
                                 f"{name}; it needs {(fixed + each) / 0.75 / 2**20 + 1:,.0f} MB, or fewer or "
                                 "shorter samples")
            stop = min(out, start + (free - fixed) // each)
            free -= fixed + each * (stop - start)
            groups[-1].append((layer, start, stop))
    return groups or [[]]


def chunk_columns(layers, row_size, budget, device):
    """How many columns of J are formed at once: whole rows of a weight, within 1/4 of the budget."""
    weights = [layer.weight for layer in layers.values() if isinstance(layer, nn.Linear)]
    if not weights:
        return 0
    widest, largest = max(w.shape[1] for w in weights), max(w.numel() for w in weights)
    columns = min(largest, max(widest, MAX_COLUMNS[device.type == "cuda"]), budget // 4 // row_size)
    if columns < widest:
        raise ValueError(f"NTK: a memory budget of {budget / 2**20:,.0f} MB is too small for one row of "
                         f"J; it needs {4 * row_size * widest / 2**20 + 1:,.0f} MB, or fewer samples")
    return columns


@contextmanager
def full_precision():
    """No TF32 or bfloat16 inside float32 products."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError as error:  # set by the other interface, torch.backends
        raise ValueError("NTK: set the precision of products by torch.set_float32_matmul_precision alone "
                         f"({str(error).splitlines()[0]})") from None
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def frozen(model):
    """No weight gradients inside; yields {layer: {name: trained parameter}}."""
    trained = [p for p in model.parameters() if p.requires_grad]
    by_layer = {module: {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}
                for module in model.modules()}
    model.requires_grad_(False)
    try:
        yield by_layer
    finally:
        for p in trained:
            p.requires_grad_(True)


def inputs_and_gradients(model, batches, group, num_classes):
    """(features (R, h), {layer: ([a of each batch], [g of each batch])}) by one pass over all batches.

    a (n, T, in); g (n, C, T, stop - start). One backward pass from the sum over samples of a logit
    gives every sample's own gradient, because no sample's logit depends on another sample.
    T counts the positions at which some g of the batch is not zero; those of a layer that is called
    twice stand side by side. Not among them are padding in every sample, and in the last Transformer
    layer all but the first token, except for key and value, which read every token.
    """
    stored, features = {layer: ([], []) for layer, _, _ in group}, []
    for batch in batches:
        n, calls = len(batch["input_ids"]), []

        def record(layer, args, output):
            if not args or not torch.is_grad_enabled():
                raise ValueError(f"NTK: {layer} is called by keyword or without gradients")
            if len(output) != n:
                raise ValueError(f"NTK: {layer} sees a tensor of shape {tuple(output.shape)}, whose "
                                 f"first dimension is not the {n} samples")
            if not output.requires_grad:  # the first layer of the group: the graph starts here
                output.requires_grad_()
            calls.append((layer, args[0], output, args[0]._version, output._version))

        hooks = [layer.register_forward_hook(record, prepend=True) for layer in stored]
        try:
            with torch.enable_grad():
                features.append(model.features(**batch))  # (n, h)
                logits = model.head(features[-1])  # (n, C); no dropout, the model is in eval mode
        except RuntimeError as error:
            if "in-place" not in str(error):
                raise
            raise ValueError("NTK: the output of a layer was changed in place") from None
        finally:
            for hook in hooks:
                hook.remove()
        for layer, a, output, a_version, output_version in calls:
            if (a._version, output._version) != (a_version, output_version):
                raise ValueError(f"NTK: the input or output of {layer} was changed in place afterwards")
        features[-1] = features[-1].detach()
        if not calls:  # nothing of this group was used
            continue
        outputs = [output for _, _, output, _, _ in calls]
        per_class = [torch.autograd.grad(logits[:, c].sum(), outputs, allow_unused=True,
                                         retain_graph=c + 1 < num_classes) for c in range(num_classes)]
        for layer, start, stop in group:
            uses = [i for i, call in enumerate(calls) if call[0] is layer and per_class[0][i] is not None]
            if uses:
                ids = isinstance(layer, nn.Embedding)
                a = join([by_position(calls[i][1].detach(), ids) for i in uses])
                g = torch.stack([join([by_position(grads[i])[..., start:stop] for i in uses])
                                 for grads in per_class], 1)  # (n, C, T, stop - start)
                alive = not_zero(g).flatten(0, 1).any(0)  # (T,)
                alive[0] |= ~alive.any()  # of no gradient at all (V = 0), one position
                stored[layer][0].append(a if alive.all() else a[:, alive])
                stored[layer][1].append(g if alive.all() else g[:, :, alive])
    for layer, (inputs, _) in stored.items():
        if 0 < len(inputs) < len(batches):
            raise ValueError(f"NTK: {layer} is used in some batches and not in others; give all the same inputs")
    return torch.cat(features), stored


def by_position(x, ids=False):
    """(n, ..., width) to (n, T, width); token ids (n, ...) to (n, T)."""
    return x.reshape(len(x), -1) if ids else x.reshape(len(x), -1, x.shape[-1])


def join(tensors):
    """Concatenated along the positions; torch.cat would copy a single one too."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)


def not_zero(g):
    """(n, C, T): whether the gradient g (n, C, T, out) has any entry that is not zero."""
    return (g.amax(3) != 0) | (g.amin(3) != 0)  # no copy of g, as g.abs() would be


class Gram:
    """K = sum over columns of J J^T, in place and in float64: (R C, N C), the lower triangle of its square.

    Narrow parts of J wait until together they are a product of some width: that saves time alone.
    They have memory of their own; what goes to add_wide may lie in memory that is used again.
    """

    def __init__(self, kernel, width):
        self.kernel, self.width, self.waiting = kernel, width, []

    def add(self, J):
        """K += J J[:N C]^T, J (R C, columns)."""
        if J.shape[1] >= self.width // 4:
            self.add_wide(J)
            return
        self.waiting.append(J)
        if sum(J.shape[1] for J in self.waiting) >= self.width // 2:
            self.add_waiting()

    def add_waiting(self):
        if self.waiting:
            self.add_wide(torch.cat(self.waiting, 1))
            self.waiting = []

    def add_wide(self, J):
        columns = self.kernel.shape[1]
        for start in range(0, columns, 128):  # a multiple of the tiles in which matrix products are computed
            stop = min(start + 128, columns)
            self.kernel[start:, start:stop] += (J[start:] @ J[start:stop].T).to(self.kernel.device)


def add_layer(gram, layer, trained, inputs, gradients, start, stop, workspace):
    """Add J J^T of the output features start to stop of one layer."""
    if "bias" in trained:  # J = sum_t g
        gram.add(torch.cat([g.sum(2) for g in gradients]).flatten(0, 1))  # (R C, slice)
    if "weight" not in trained:
        return
    if isinstance(layer, nn.Embedding):
        add_embedding(gram, layer.padding_idx, inputs, gradients)
    elif isinstance(layer, nn.LayerNorm):  # J = sum_t g * x_hat
        normal = [F.layer_norm(a, layer.normalized_shape, eps=layer.eps)[..., start:stop] for a in inputs]
        gram.add(torch.cat([torch.einsum("nctw,ntw->ncw", g, x)
                            for g, x in zip(gradients, normal)]).flatten(0, 1))
    else:
        add_linear(gram, inputs, gradients, workspace)


def add_linear(gram, inputs, gradients, workspace):
    """J = sum_t g_t a_t^T, (out, in) per sample and logit; formed in chunks of rows, or not at all."""
    a, g = inputs[0], gradients[0]
    (C, T, out), width = g.shape[1:], a.shape[2]
    T = max(a.shape[1] for a in inputs)
    if 2 * T * T * (width + C * C * (out + 64)) < C * C * out * width:
        # Few positions: J J^T = sum_ts <a_t, a'_s> <g_t, g'_s>, without J. The left side counts the
        # multiplications of that for one pair of samples (64 for the passes over the kernel, in float64),
        # the right side those of J J^T, of which half are done.
        a = torch.cat([F.pad(a, (0, 0, 0, T - a.shape[1])) for a in inputs])  # (R, T, in)
        g = torch.cat([F.pad(g, (0, 0, 0, T - g.shape[2])) for g in gradients]).flatten(0, 1)  # (R C, T, out)
        kernel, columns = gram.kernel, gram.kernel.shape[1]
        for t in range(T):
            for s in range(T):
                a_ts = a[:, t] @ a[:columns // C, s].T  # (R, N)
                g_ts = g[:, t] @ g[:columns, s].T  # (R C, N C)
                kernel += (g_ts * a_ts.repeat_interleave(C, 0).repeat_interleave(C, 1)).to(kernel.device)
        return
    R = sum(len(a) for a in inputs)
    rows = min(out, workspace.numel() // (R * C * width))
    for o in range(0, out, rows):
        size, first = min(rows, out - o), 0
        J = workspace[:R * C * size * width].view(R, C * size, width)
        for a, g in zip(inputs, gradients):
            g_rows = g[..., o:o + size].transpose(2, 3).flatten(1, 2)  # (n, C size, T)
            torch.bmm(g_rows, a, out=J[first:first + len(a)])
            first += len(a)
        gram.add_wide(J.view(R * C, size * width))  # at once: the next chunk takes the same memory


def add_embedding(gram, padding_idx, inputs, gradients):
    """J has one row per token id: the sum of g where the id stands. One small product per id."""
    kernel, C, width = gram.kernel, gradients[0].shape[1], gradients[0].shape[3]
    samples, ids, values, R = [], [], [], 0
    for a, g in zip(inputs, gradients):
        keep = not_zero(g).any(1)  # (n, T)
        if padding_idx is not None:
            keep &= a != padding_idx  # nn.Embedding gives this row no gradient
        samples.append(keep.nonzero()[:, 0] + R)
        ids.append(a[keep])
        values.append(g.transpose(1, 2)[keep])  # (kept, C, width)
        R += len(a)
    key = torch.cat(ids) * R + torch.cat(samples)  # orders by id, then by sample
    key, where = key.unique(return_inverse=True)  # one entry for a token that stands twice
    J = torch.zeros(len(key), C, width, dtype=values[0].dtype, device=key.device)
    J.index_add_(0, where, torch.cat(values))
    counts = torch.unique_consecutive(key // R, return_counts=True)[1].tolist()
    for J_id, sample in zip(J.split(counts), (key % R).split(counts)):
        if 2 * len(J_id) > R:  # most samples have it ([CLS], a position): zeros for the others are faster
            everywhere = J.new_zeros(R, C, width)
            everywhere[sample] = J_id
            gram.add(everywhere.flatten(0, 1))
            continue
        row = (sample[:, None] * C + torch.arange(C, device=key.device)).flatten().to(kernel.device)
        column = row[row < kernel.shape[1]]  # training samples come first
        J_id = J_id.flatten(0, 1)
        kernel[row[:, None], column] += (J_id @ J_id[:len(column)].T).to(kernel.device)


def spot_check(model, batches, num_train, kernel_pretrain, kernel_ft, budget):
    """Compare six entries of P and of F (R, C, N, C) with autograd; ArithmeticError where they differ.

    Each by itself, against its own diagonal: where P is large, Theta would hide an error of F.
    """
    def sample(n):  # as a batch of one
        for batch in batches:
            if n < len(batch["input_ids"]):
                return {name: t[n:n + 1] for name, t in batch.items()}
            n -= len(batch["input_ids"])

    last = kernel_ft.shape[1] - 1
    points = [(0, 0), (num_train - 1, last), (len(kernel_ft) - 1, 0)]  # (sample, logit); two of training
    with torch.enable_grad():
        logits = [model(**sample(n))[0, c] for n, c in points]
    tolerance = 1e-4 if model.head.weight.dtype == torch.float32 else 1e-9
    for part, kernel in (("P", kernel_pretrain), ("F", kernel_ft)):
        trained = [p for name, p in model.named_parameters()
                   if p.requires_grad and name.startswith("head.") == (part == "P")]
        expected = torch.zeros(3, 3, dtype=torch.double)
        for chunk in by_size(trained, budget // 4):  # three gradients and a product of two
            gradients = [[g.cpu() for g in torch.autograd.grad(logit, chunk, retain_graph=True,
                                                               materialize_grads=True)] for logit in logits]
            for i in range(3):
                for j in range(i + 1):  # sums of millions of float32 terms: in float64
                    expected[i, j] += sum((x * y).sum(dtype=torch.double).item()
                                          for x, y in zip(gradients[i], gradients[j]))
        for i, (n, c) in enumerate(points):
            for j, (m, d) in enumerate(points[:2]):
                autograd, found = float(expected[max(i, j), min(i, j)]), float(kernel[n, c, m, d])
                scale = float(expected[i, i] * expected[j, j]) ** 0.5
                if not abs(found - autograd) <= tolerance * scale:
                    raise ArithmeticError(
                        f"NTK: the spot check failed: {part} of sample {n}, logit {c} and sample {m}, logit {d} is "
                        f"{found:.8g}, autograd says {autograd:.8g}. Does the model use a parameter outside its "
                        "own layer, or let samples depend on each other?")


def by_size(tensors, size):
    """`tensors` in lists of at most `size` bytes, or of one."""
    lists, free = [], 0
    for tensor in tensors:
        bytes_of = tensor.numel() * tensor.element_size()
        if bytes_of > free:
            lists.append([])
            free = size
        lists[-1].append(tensor)
        free -= bytes_of
    return lists


# ---------------------------------------------------------------------------- what the paper measures


def initial_deltas(logits, labels):
    """delta_i = onehot(y_i) - softmax(f_0(x_i)), (N, C): minus the gradient of the loss by the logits."""
    return F.one_hot(labels, logits.shape[1]).double() - logits.double().softmax(1)


def predicted_logit_change(ntk, deltas, lr, test=False):
    """eq. (1): lr * sum_i (P + F)(x, x_i) delta_i, for training x (N, C), or with test=True (M, C).

    The first-order effect of one gradient step of size lr on the summed loss; deltas (N, C).
    """
    theta = ntk.test_pretrain + ntk.test_ft if test else ntk.pretrain + ntk.ft
    return lr * torch.einsum("mcnd,nd->mc", theta, deltas.double())


def ft_ratio(ntk, deltas):
    """Table 2: mean over training x of ||sum_i F(x, x_i) delta_i|| / ||sum_i (P + F)(x, x_i) delta_i||."""
    from_ft = torch.einsum("mcnd,nd->mc", ntk.ft, deltas.double())  # (N, C)
    return float((from_ft.norm(dim=1) / predicted_logit_change(ntk, deltas, 1.0).norm(dim=1)).mean())


def kernel_statistics(kernel):
    """Of a kernel (N, C, M, C) as an NC x MC matrix, in a dict:

    rank             number of singular values above float32's rounding of the largest
    frobenius        Frobenius norm
    singular_values  divided by the largest, falling (Fig. 2, 7)
    trace_norms      (N, M): sum of the singular values of each C x C block (Fig. 8, 9)
    """
    matrix = kernel.flatten(2).flatten(0, 1).double()  # (N C, M C)
    values = torch.linalg.svdvals(matrix)
    tolerance = max(matrix.shape) * torch.finfo(torch.float32).eps * values[0]
    return {"rank": int((values > tolerance).sum()), "frobenius": float(matrix.norm()),
            "singular_values": values / values[0].clamp(min=1e-300),
            "trace_norms": torch.linalg.svdvals(kernel.transpose(1, 2).double()).sum(2)}


def kernel_regression(train_kernel, train_labels, test_kernel, test_labels):
    """Table 2's kernel regression: L2 logistic regression on kernel rows, one row per sample and logit.

    Row (i, c) of the NC x NC matrix is the input, its target is whether c is the label of sample i.
    Returns a dict: train_accuracy and test_accuracy of classes (the logit with the highest score),
    train_logit_accuracy and test_logit_accuracy of the single decisions, and inverse_l2, chosen by
    5-fold cross-validation in which a sample is never split. The kernel is divided by its mean
    diagonal first, so that one grid of strengths serves P, F and Theta.
    """
    C = train_kernel.shape[1]
    rows = train_kernel.flatten(2).flatten(0, 1)  # (N C, N C)
    test_rows = test_kernel.flatten(2).flatten(0, 1)  # (M C, N C)
    scale = float(rows.diagonal().mean()) or 1.0  # 0: F of a head V = 0
    targets = [F.one_hot(labels, C).flatten() for labels in (train_labels, test_labels)]
    probe = fit_linear_probe(rows / scale, targets[0], 2,
                             fold_of=stratified_folds(train_labels).repeat_interleave(C))
    found = {"inverse_l2": probe.inverse_l2}
    for name, x, labels, target in (("train", rows, train_labels, targets[0]),
                                    ("test", test_rows, test_labels, targets[1])):
        logits = x / scale @ probe.weight.T + probe.bias  # (N C, 2): no, yes
        score = logits[:, 1] - logits[:, 0]
        found[f"{name}_accuracy"] = float((score.view(-1, C).argmax(1) == labels).double().mean())
        found[f"{name}_logit_accuracy"] = float(((score > 0) == (target == 1)).double().mean())
    return found
