"""LoRA: a frozen matrix, and beside it an update of low rank that starts at zero (paper Prop. 4.4)."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from assignments.graders import expect, points, require

NO_SCALE = "the update is not scaled"
ALPHA = "scaling by lora_alpha, where it is lora_alpha / r"
TIMES_R = "scaling by lora_alpha * r, where it is lora_alpha / r"
UPSIDE_DOWN = "scaling by r / lora_alpha, where it is lora_alpha / r"
WHOLE = "lora_alpha // r: the fraction is lost"
ROOT = "scaling by lora_alpha / sqrt(r), where it is lora_alpha / r"
TRANSPOSED = "B A transposed"
NO_BIAS = "W_0's bias is lost"
SHARED_BIAS = "merged() shares W_0's bias, where it is a copy"
UPDATE_ALONE = "the update alone: W_0 is lost"
W_0_ALONE = "W_0 alone: the update is lost"
TWICE = "adding the update twice"
SCALED_ALL = "scaling W_0 x + bias, too"
IN_PLACE = "merging into W_0 itself: the layer then adds its update twice"
A_ZERO = "lora_A starts at zero, too: then no gradient ever reaches lora_B"
B_RANDOM = "lora_B does not start at zero: the layer does not start as W_0"
A_NO_ROOT = "kaiming_uniform_ without a = sqrt(5)"
A_OUT = "the bound of lora_A from r, where it is from `in`"
A_SMALL = "lora_A drawn from N(0, 0.02^2)"
A_NORMAL = "lora_A drawn from a normal distribution with the right variance"
BIAS_TRAINS = "W_0's bias still trains"
W_0_TRAINS = "W_0 and its bias still train"
OWN_BIAS = "lora_A and lora_B with a bias of their own"
NOTHING_TRAINS = "lora_A and lora_B are frozen, too"
MERGED_TRAINS = "the merged layer trains"
FORMED = "forming B A: nothing goes through the layers lora_A and lora_B, where the kernel is read"
MODE = "the layer starts in training mode whatever W_0's mode is"


def linear_of(rng, inputs, outputs, bias=True):
    """W_0 and its bias, random."""
    linear = nn.Linear(inputs, outputs, bias=bias)
    for parameter in linear.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=rng))
    return linear


def layer_of(student, rng, inputs=6, outputs=6, r=5, lora_alpha=14, bias=True):
    """The student's layer with everything random, and copies in float64: layer, W_0, bias, A, B."""
    linear = linear_of(rng, inputs, outputs, bias)
    W, b = linear.weight.detach().double(), linear.bias.detach().double() if bias else torch.zeros(outputs)
    layer = student.LoRALinear(linear, r, lora_alpha)
    for part in (layer.lora_A, layer.lora_B):
        part.weight.data.copy_(torch.randn(part.weight.shape, generator=rng))
    return layer, W, b, *(part.weight.detach().double() for part in (layer.lora_A, layer.lora_B))


def trainable(module):
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def scaled(r, lora_alpha, result):
    """What wrong scalings give, {name: result(scaling)}."""
    return {name: result(scaling) for name, scaling in (
        (ALPHA, lora_alpha), (TIMES_R, lora_alpha * r), (UPSIDE_DOWN, r / lora_alpha),
        (WHOLE, lora_alpha // r), (ROOT, lora_alpha / r**0.5), (NO_SCALE, 1.0), (TWICE, 2 * lora_alpha / r),
        (W_0_ALONE, 0.0))}


@points(1)
def it_starts_as_w_0(student, rng):
    "lora_B = 0 at the start, so the layer computes W_0 x + bias"
    linear, x = linear_of(rng, 7, 5), torch.randn(3, 4, 7, generator=rng)
    before = linear(x).detach()
    layer = student.LoRALinear(linear, 3, 6)
    A, B = layer.lora_A.weight, layer.lora_B.weight
    expect(layer(x), before, "LoRALinear(linear (7 to 5), r=3, lora_alpha=6)(x (3, 4, 7)), new",
           {B_RANDOM: before + 2.0 * x @ (B @ A).T, OWN_BIAS: before + 2.0 * layer.lora_B(layer.lora_A(x)),
            NO_BIAS: before - linear.bias, UPDATE_ALONE: 0 * before}, tolerance=1e-6)
    expect(B, torch.zeros(5, 3), "LoRALinear(linear (7 to 5), r=3, lora_alpha=6).lora_B.weight, new")


@points(1)
def a_starts_as_nn_linear_draws(student, rng):
    "lora_A is uniform between -1 / sqrt(in) and 1 / sqrt(in): kaiming_uniform_ with a = sqrt(5)"
    linear = linear_of(rng, 100, 3)
    A = student.LoRALinear(linear, 64, 8).lora_A.weight.detach()
    called = "LoRALinear(linear (100 to 3), r=64, lora_alpha=8).lora_A.weight, new: "
    require(A.shape == (64, 100), called + "its shape", "(64, 100)", tuple(A.shape))
    expect(float(A.std()), 300**-0.5, called + "its standard deviation, 1 / sqrt(3 in)",  # within 0.6 %
           {A_ZERO: 0.0, A_NO_ROOT: (2 / 100)**0.5, A_OUT: (3 * 64)**-0.5, A_SMALL: 0.02}, tolerance=0.05)
    largest = float(A.abs().max())  # of a normal distribution about 0.22
    expect(largest, 0.1, called + "its largest entry, at most 1 / sqrt(in)",
           {A_NORMAL: largest} if largest > 0.15 else None, tolerance=0.01)


@points(1)
def the_update_is_added(student, rng):
    "The layer computes W_0 x + bias + (lora_alpha / r) B A x"
    layer, W, b, A, B = layer_of(student, rng, r=5, lora_alpha=14)
    x = torch.randn(5, 6, generator=rng)

    def result(scaling):
        return x.double() @ W.T + b + scaling * x.double() @ A.T @ B.T

    expect(layer(x), result(2.8), "LoRALinear(linear (6 to 6), r=5, lora_alpha=14)(x (5, 6)), B not zero",
           scaled(5, 14, result) | {
               TRANSPOSED: x.double() @ W.T + b + 2.8 * x.double() @ B @ A, NO_BIAS: result(2.8) - b,
               UPDATE_ALONE: result(2.8) - result(0.0), SCALED_ALL: 2.8 * result(1.0)}, tolerance=1e-4)


@points(1)
def any_shape_of_text(student, rng):
    "(..., in) to (..., out): also of one vector, of texts (N, L, in), and of a W_0 without bias"
    for shape, bias in (((5,), True), ((2, 3, 5), True), ((2, 3, 5), False)):
        layer, W, b, A, B = layer_of(student, rng, 5, 4, r=3, lora_alpha=7, bias=bias)
        x = torch.randn(shape, generator=rng)
        expect(layer(x), x.double() @ (W + 7 / 3 * B @ A).T + b,
               f"LoRALinear(linear (5 to 4{', no bias' * (not bias)}), r=3, lora_alpha=7)(x {shape})",
               scaled(3, 7, lambda s: x.double() @ (W + s * B @ A).T + b), tolerance=1e-4)


@points(1)
def x_is_squeezed_and_spread(student, rng):
    """forward calls lora_A on (..., in), then lora_B on (..., r), and forms no B A; scaling = lora_alpha / r.

    The project reads the kernel there, and saves the scaling.
    """
    layer, W, b, A, B = layer_of(student, rng, 6, 5, r=5, lora_alpha=14)
    x, seen = torch.randn(2, 3, 6, generator=rng), []
    for part in (layer.lora_A, layer.lora_B):
        part.register_forward_hook(lambda part, given, result: seen.append([*given[0].shape]))
    found, called = layer(x), "LoRALinear(linear (6 to 5), r=5, lora_alpha=14)(x (2, 3, 6))"
    expect(found, x.double() @ (W + 2.8 * B @ A).T + b, called,
           scaled(5, 14, lambda s: x.double() @ (W + s * B @ A).T + b), tolerance=1e-4)
    expect(str(seen), "[[2, 3, 6], [2, 3, 5]]", called + ": what lora_A and lora_B are called on",
           {FORMED: "[]"})
    called = "LoRALinear(linear (6 to 5), r=5, lora_alpha=14).scaling"
    expect(layer.scaling, 2.8, called, scaled(5, 14, float))


@points(2)
def only_a_and_b_train(student, rng):
    "W_0 and its bias are frozen: r (in + out) numbers train, those of lora_A and lora_B"
    inputs, outputs, r = torch.randint(3, 9, (3,), generator=rng).tolist()
    layer, W, b, A, B = layer_of(student, rng, inputs, outputs, r)
    called = f"LoRALinear(linear ({inputs} to {outputs}), r={r}, lora_alpha=6): "
    both = r * (inputs + outputs)
    expect(trainable(layer), both, called + "numbers with requires_grad",
           {BIAS_TRAINS: both + outputs, W_0_TRAINS: both + outputs + inputs * outputs,
            OWN_BIAS: both + outputs + r, NOTHING_TRAINS: 0})
    layer(torch.randn(4, inputs, generator=rng)).square().sum().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= 0.01 * (parameter.grad if parameter.grad is not None else 0)
    expect(layer.linear.weight, W, called + "linear.weight after a step of gradient descent")
    expect(layer.linear.bias, b, called + "linear.bias after a step of gradient descent", tolerance=1e-6)


@points(1)
def the_first_step_moves_b_alone(student, rng):
    "At the start dloss/dA = 0, as B = 0, and dloss/dB = (lora_alpha / r) sum_i g_i (A x_i)^T, as A is not"
    layer = student.LoRALinear(linear_of(rng, 6, 5), 5, 14)
    x, g = torch.randn(3, 6, generator=rng), torch.randn(3, 5, generator=rng)
    (layer(x) * g).sum().backward()
    A = layer.lora_A.weight.detach().double()
    outer = sum(g_i.double()[:, None] * (A @ x_i.double())[None] for g_i, x_i in zip(g, x))  # (out, r)
    called = "LoRALinear(linear (6 to 5), r=5, lora_alpha=14), new, loss = sum_i g_i . layer(x_i): "
    expect(bool((A != 0).any()), True, called + "whether dloss/dB is not zero", {A_ZERO: False})
    expect(layer.lora_B.weight.grad, 2.8 * outer, called + "the gradient of lora_B.weight",
           scaled(5, 14, lambda s: s * outer), tolerance=1e-4)
    expect(layer.lora_A.weight.grad, torch.zeros(5, 6), called + "the gradient of lora_A.weight",
           {B_RANDOM: layer.lora_A.weight.grad})


@points(2)
def merged_is_the_same_function(student, rng):
    "merged() has the weight W_0 + (lora_alpha / r) B A and W_0's bias: without LoRA, the same function of x"
    layer, W, b, A, B = layer_of(student, rng, r=5, lora_alpha=14)
    called = "LoRALinear(linear (6 to 6), r=5, lora_alpha=14).merged()"
    merged = layer.merged()
    expect(merged.weight, W + 2.8 * B @ A, called + ".weight", scaled(5, 14, lambda s: W + s * B @ A) | {
        TRANSPOSED: W + 2.8 * (B @ A).T, UPDATE_ALONE: 2.8 * B @ A, SCALED_ALL: 2.8 * (W + B @ A)},
           tolerance=1e-4)
    x = torch.randn(5, 6, generator=rng)
    right = x.double() @ (W + 2.8 * B @ A).T + b
    expect(merged(x), right, called + "(x (5, 6))", {NO_BIAS: right - b}, tolerance=1e-4)
    layer, W, b, A, B = layer_of(student, rng, 5, 4, r=3, lora_alpha=7, bias=False)
    called = "LoRALinear(linear (5 to 4, no bias), r=3, lora_alpha=7).merged().weight"
    expect(layer.merged().weight, W + 7 / 3 * B @ A, called, scaled(3, 7, lambda s: W + s * B @ A),
           tolerance=1e-4)


@points(1)
def merging_leaves_the_layer_alone(student, rng):
    "merged() is a new nn.Linear, frozen; the layer keeps its W_0 and its function, however often you merge"
    layer, W, b, A, B = layer_of(student, rng, r=5, lora_alpha=14)
    x, update = torch.randn(5, 6, generator=rng), 2.8 * B @ A
    first = layer.merged()
    expect(layer.linear.weight, W, "linear.weight after merged()", {IN_PLACE: W + update})
    merged = layer.merged()
    expect(merged.weight, W + update, "merged().weight, the second time", {IN_PLACE: W + 2 * update},
           tolerance=1e-4)
    require(type(merged) is nn.Linear, "type(merged())", "Linear", type(merged).__name__)
    expect(trainable(merged), 0, "merged(): numbers with requires_grad", {MERGED_TRAINS: 42})
    for parameter in first.parameters():
        parameter.data.zero_()
    expect(layer(x), x.double() @ (W + update).T + b, "layer(x (5, 6)) after merged() was changed",
           {SHARED_BIAS: x.double() @ (W + update).T, IN_PLACE: x.double() @ update.T}, tolerance=1e-4)


@points(1)
def it_takes_after_w_0(student, rng):
    "lora_A and lora_B have W_0's dtype, the layer has W_0's mode, and train() and eval() touch no weight"
    linear = linear_of(rng, 6, 6).double().eval()
    W, b = linear.weight.detach().clone(), linear.bias.detach().clone()
    layer = student.LoRALinear(linear, 5, 14)
    called = "LoRALinear(linear (6 to 6) in float64 and eval mode, r=5, lora_alpha=14): "
    for part in (layer.lora_A, layer.lora_B):
        expect(str(part.weight.dtype), "torch.float64", called + "dtype of lora_A.weight and lora_B.weight")
        part.weight.data.copy_(torch.randn(part.weight.shape, generator=rng))
    x = torch.randn(5, 6, generator=rng).double()
    right = F.linear(x, W + 2.8 * layer.lora_B.weight.detach() @ layer.lora_A.weight.detach(), b)
    training = layer.training
    for mode in (True, False, False, True):
        expect(layer.train(mode)(x), right, called + f"train({mode}), then layer(x (5, 6))", tolerance=1e-9)
    expect(training, False, called + "training", {MODE: True})
