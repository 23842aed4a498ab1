"""The kernel against its definition, and the paper's theory as facts about small models, in float64."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import PredefinedSplit, StratifiedKFold

import ntk as ntk_file
import pretrain
from data import encode, tiny
from model import Classifier, Encoder, LoRALinear, add_lora, load_pretrained
from ntk import (empirical_ntk, ft_ratio, initial_deltas, kernel_regression, kernel_statistics,
                 ntk_by_jacobian, predicted_logit_change)

pytestmark = [pytest.mark.filterwarnings("ignore:There is a performance drop"),  # vmap over attention
              pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")]
PARTS = ("pretrain", "ft", "test_pretrain", "test_ft")


def make_batch(lengths, seed, padding=2):
    lengths, generator = torch.tensor(lengths), torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths) + padding) < lengths[:, None]).long()
    ids = torch.randint(5, 40, mask.shape, generator=generator) * mask  # few words: repeated ids
    ids[0, 1] = 0  # a padding token that is not masked: its embedding gets no gradient all the same
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (mask.cumsum(1) > 3).long() * mask}


TRAIN = [make_batch([7, 12, 4], 1), make_batch([3, 9], 2)]
TEST = [make_batch([6, 2], 3)]


@pytest.fixture
def model(encoder):
    model = Classifier(encoder, 3).double().eval()
    nn.init.normal_(model.head.weight, std=0.5)
    return model


def randomise_lora(model):
    """B = 0 hides the kernel of A: move both matrices away from the start."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B.weight, std=0.1)


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


# ------------------------------------------------------------------------------------ the engine


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("budget", [2**31, 3 * 2**17], ids=["2 GB", "384 kB"])
def test_the_engine_computes_the_definition(model, lora, dtype, tolerance, budget):
    """Prop. 4.1 by Jacobians in float64, by layers in any precision: the same four kernels."""
    if lora:
        add_lora(model.encoder, r=4, lora_alpha=12)
        randomise_lora(model)
    expected = ntk_by_jacobian(model, TRAIN, TEST)
    found = empirical_ntk(model.to(dtype), TRAIN, TEST, memory_budget=budget)
    for part in PARTS:
        assert getattr(found, part).dtype == torch.float64
        assert relative_error(getattr(found, part), getattr(expected, part)) < tolerance, part


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_engine_computes_the_definition_for_a_real_encoder(minilm, lora):
    """MiniLM-L6, 22.6 M parameters, with padding; one batch or many, one pass or many."""
    encoder, tokenizer = load_pretrained(minilm)
    torch.manual_seed(0)
    model = Classifier(encoder, 3).double().eval()
    if lora:
        add_lora(model.encoder, r=4, lora_alpha=12)
        randomise_lora(model)
    split = encode(tokenizer, [("A fine film.", None, 0), ("The room was cold.", "It was small.", 0),
                               ("Soup", None, 0)], 16)
    together = [split.batch([0, 1])[0], split.batch([2])[0]]
    apart = [split.batch([i])[0] for i in range(3)]
    expected = ntk_by_jacobian(model, together[:1], together[1:])
    for dtype, tolerance in (torch.float64, 1e-12), (torch.float32, 1e-6):
        for batches, budget in (together, 2**31), (apart, 2**23):
            found = empirical_ntk(model.to(dtype), batches[:-1], batches[-1:], budget)
            for part in PARTS:
                assert relative_error(getattr(found, part), getattr(expected, part)) < tolerance, part


def test_the_kernel_does_not_depend_on_batches_and_padding(model):
    whole = empirical_ntk(model, [make_batch([7, 12, 4], 1)], TEST)
    rows = [{k: t[i:i + 1] for k, t in make_batch([7, 12, 4], 1, padding=20).items()} for i in range(3)]
    ids = make_batch([7, 12, 4], 1)["input_ids"]
    for i, row in enumerate(rows):  # the same words, 20 pads behind them
        row["input_ids"] = F.pad(ids[i:i + 1], (0, 18))
    apart = empirical_ntk(model, rows, TEST)
    for part in PARTS:
        assert relative_error(getattr(apart, part), getattr(whole, part)) < 1e-12


def test_a_position_is_dead_only_where_every_entry_is_zero():
    g = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [0.0, 1e-30], [-1.0, -2.0]]).view(1, 1, 4, 2)
    assert ntk_file.not_zero(g).flatten().tolist() == [False, True, True, True]


def test_a_kernel_of_more_than_one_tile(model):
    """The Gram product is cut into tiles of 128 rows: 47 training samples and 3 logits need two."""
    train, test = [make_batch([3, 4, 5] * 15 + [6, 7], 1)], [make_batch([5, 3], 2)]
    expected, found = ntk_by_jacobian(model, train, test), empirical_ntk(model, train, test)
    for part in PARTS:
        assert relative_error(getattr(found, part), getattr(expected, part)) < 1e-12, part


def test_the_kernel_leaves_the_model_as_it_was(model):
    add_lora(model.encoder, r=4, lora_alpha=12)
    before = copy.deepcopy(model.state_dict())
    trained = [p.requires_grad for p in model.parameters()]
    empirical_ntk(model, TRAIN)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def refuse_training(model):
    model.encoder.layers[1].train()


def refuse_tied(model):
    model.encoder.layers[0].attention.query.weight = model.encoder.layers[1].attention.query.weight


def refuse_bare(model):
    model.encoder.scale = nn.Parameter(torch.ones(()))


def refuse_unknown(model):
    model.encoder.layers[0].extra = nn.Conv1d(64, 64, 1).eval()


def refuse_frozen_head(model):
    model.head.requires_grad_(False)


def refuse_no_bias(model):
    model.head = nn.Linear(64, 3, bias=False).double().eval()


def refuse_pooler(model):
    """A part that trains outside encoder and head."""
    model.pooler = nn.Conv1d(1, 1, 1).double().eval()


def refuse_weight_norm(model):
    """Still an nn.Linear, but its weight is made from two parameters."""
    torch.nn.utils.weight_norm(model.encoder.layers[0].ffn_in)


def refuse_max_norm(model):
    model.encoder.word_embeddings.max_norm = 1.0


def refuse_scaled_gradients(model):
    model.encoder.word_embeddings.scale_grad_by_freq = True


def refuse_wide_norm(model):
    model.encoder.layers[0].attention_norm = nn.LayerNorm((12, 64)).double().eval()


def refuse_half(model):
    model.bfloat16()


def refuse_in_place(model):
    def edit_the_input(module, args):
        args[0].add_(0.0)  # the output of the normalisation before

    model.encoder.layers[0].ffn_in.register_forward_pre_hook(edit_the_input)


def refuse_in_place_output(model):
    def edit_the_output(module, args, output):
        return output.mul_(1.0)

    model.encoder.layers[0].attention.query.register_forward_hook(edit_the_output)


def refuse_keyword(model):
    model.encoder.layers[0].ffn_out = Keyword(model.encoder.layers[0].ffn_out).eval()


class Keyword(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(input=x)


def refuse_no_grad(model):
    model.encoder.word_embeddings = Detached(model.encoder.word_embeddings).eval()


class Detached(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, ids):
        with torch.no_grad():
            return self.layer(ids)


def refuse_transposed(model):
    """The first dimension is not that of samples."""
    model.encoder.layers[0].ffn_in = Transposed(model.encoder.layers[0].ffn_in).eval()


class Transposed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("spoil, message", [
    (refuse_training, "encoder.layers.1 is in training mode"), (refuse_tied, "same tensor"),
    (refuse_bare, r"encoder \(Encoder\) owns the parameter scale"), (refuse_unknown, "Conv1d"),
    (refuse_frozen_head, "head is not a Linear with a bias that trains"), (refuse_no_bias, "head is not a Linear"),
    (refuse_pooler, r"pooler \(Conv1d\)"), (refuse_weight_norm, "owns the parameter weight_g"),
    (refuse_max_norm, "max_norm"), (refuse_scaled_gradients, "scale_grad_by_freq"),
    (refuse_wide_norm, "more than the last dimension"), (refuse_half, "torch.bfloat16"),
    (refuse_in_place, "changed in place"), (refuse_in_place_output, "changed in place"),
    (refuse_keyword, "by keyword"), (refuse_no_grad, "without gradients"), (refuse_transposed, "first dimension"),
])
def test_what_would_not_be_exact_is_refused_with_a_sentence(model, spoil, message):
    spoil(model)
    with pytest.raises(ValueError, match=message):
        empirical_ntk(model, TRAIN)


def test_batches_that_are_none_or_differ_in_what_they_hold_are_refused(model):
    with pytest.raises(ValueError, match="no training batches"):
        empirical_ntk(model, [])
    with pytest.raises(ValueError, match="found one batch"):
        empirical_ntk(model, TRAIN[0])
    extra = nn.Embedding(5, 64).double()
    model.encoder.word_embeddings = SometimesMore(model.encoder.word_embeddings, extra).eval()
    with pytest.raises(ValueError, match="used in some batches and not in others"):
        empirical_ntk(model, TRAIN)


class SometimesMore(nn.Module):
    def __init__(self, layer, extra):
        super().__init__()
        self.layer, self.extra = layer, extra

    def forward(self, ids):
        return self.layer(ids) + (self.extra(ids % 5) if len(ids) == 3 else 0)


def test_autocast_and_a_budget_too_small_are_refused(model):
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        empirical_ntk(model, TRAIN)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        empirical_ntk(model, TRAIN)
    with pytest.raises(ValueError, match="memory budget .* too small"):
        empirical_ntk(model, TRAIN, memory_budget=2**10)


@pytest.mark.parametrize("budget", [2**17, 2**18, 2**20])
def test_what_a_pass_keeps_is_within_three_quarters_of_the_budget(model, budget, monkeypatch):
    """And the smallest budget cuts Linear, LayerNorm and Embedding into slices, with the same kernel."""
    for layer in model.encoder.layers:  # its wide input alone is more than the smallest budget
        layer.ffn_out.requires_grad_(False)
    expected, kept, cut = empirical_ntk(model, TRAIN, TEST), [], set()
    compute = ntk_file.inputs_and_gradients

    def watch(model, batches, group, num_classes):
        features, stored = compute(model, batches, group, num_classes)
        kept.append(sum(t.nbytes for of_layer in stored.values() for tensors in of_layer for t in tensors))
        cut.update(type(layer) for layer, start, stop in group if stop - start < ntk_file.out_features(layer))
        return features, stored

    monkeypatch.setattr(ntk_file, "inputs_and_gradients", watch)
    monkeypatch.setattr(ntk_file, "chunk_columns", lambda layers, *_: 2**14)
    found = empirical_ntk(model, TRAIN, TEST, budget)
    assert max(kept) <= 0.75 * budget
    assert budget != 2**17 or cut == {nn.Linear, nn.LayerNorm, nn.Embedding}
    for part in PARTS:
        assert relative_error(getattr(found, part), getattr(expected, part)) < 1e-12


def test_a_chunk_of_j_is_within_a_quarter_of_the_budget(model):
    layers = ntk_file.trainable_layers(model)
    for budget in (2**22, 2**24, 2**26):
        columns = ntk_file.chunk_columns(layers, 8 * 400, budget, torch.device("cpu"))
        assert 256 <= columns <= budget / 4 / (8 * 400)


def test_a_layer_that_is_called_twice_has_the_kernel_of_both_calls(model):
    attention = model.encoder.layers[0].attention
    forward = attention.forward
    attention.forward = lambda x, *more: forward(forward(x, *more), *more)
    expected, found = ntk_by_jacobian(model, TRAIN, TEST), empirical_ntk(model, TRAIN, TEST)
    for part in PARTS:
        assert relative_error(getattr(found, part), getattr(expected, part)) < 1e-12, part


def test_products_are_in_full_precision_and_the_setting_comes_back(model):
    """TF32 on a GPU, bfloat16 on some CPUs: not inside, and as before outside."""
    seen = set()
    model.encoder.layers[0].ffn_in.register_forward_hook(
        lambda *_: seen.add(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high")
    try:
        empirical_ntk(model, TRAIN)
        assert seen == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("wrong", ["first", "last", "test"])
def test_the_spot_check_sees_one_missing_layer_where_p_is_large(model, lora, wrong, monkeypatch):
    """F is compared by itself: under a small head Theta is nearly all P, and would hide it."""
    if lora:
        add_lora(model.encoder, r=4, lora_alpha=12)
        randomise_lora(model)
    with torch.no_grad():
        model.head.weight *= 1e-3
    model, check = model.float(), ntk_file.spot_check

    def spoiled(model, batches, num_train, kernel_pretrain, kernel_ft, budget):
        row, column = {"first": (0, 0), "last": (num_train - 1, num_train - 1), "test": (-1, 0)}[wrong]
        kernel_ft[row, :, column] *= 1.01
        check(model, batches, num_train, kernel_pretrain, kernel_ft, budget)

    monkeypatch.setattr(ntk_file, "spot_check", spoiled)
    with pytest.raises(ArithmeticError, match="F of sample"):
        empirical_ntk(model, TRAIN, TEST)


def test_the_spot_check_takes_parameters_in_parts_within_the_budget():
    tensors = [torch.zeros(n) for n in (10, 20, 30, 5, 100)]
    parts = ntk_file.by_size(tensors, 4 * 60)
    assert [len(part) for part in parts] == [3, 1, 1] and sum(parts, []) == tensors


def test_the_spot_check_finds_a_weight_that_is_used_outside_its_layer(model):
    """Hooks see a layer's own call alone; autograd sees every use."""
    forward = model.encoder.forward

    def with_a_second_use(*args, **kwargs):
        return forward(*args, **kwargs) + model.encoder.layers[0].ffn_in.weight.sum()

    model.encoder.forward = with_a_second_use
    with pytest.raises(ArithmeticError, match="spot check"):
        empirical_ntk(model, TRAIN)


# ------------------------------------------------------------------------------------ the theory


def summed_loss(model, batches, labels):
    return F.cross_entropy(torch.cat([model(**b) for b in batches]), labels, reduction="sum")


def all_logits(model, batches):
    with torch.no_grad():
        return torch.cat([model(**b) for b in batches])


def all_features(model, batches):
    with torch.no_grad():
        return torch.cat([model.features(**b) for b in batches])


def after_one_step(model, lr, labels):
    """A copy of the model after one step of gradient descent on the summed training loss."""
    stepped = copy.deepcopy(model)
    summed_loss(stepped, TRAIN, labels).backward()
    with torch.no_grad():
        for p in stepped.parameters():
            if p.grad is not None:
                p -= lr * p.grad
    return stepped


LABELS = torch.tensor([0, 2, 1, 1, 0])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_prop_4_1_theta_is_p_plus_f_and_p_has_a_closed_form(model, lora):
    """Theta over all parameters at once; P(x, x') = (<phi(x), phi(x')> + 1) I."""
    if lora:
        add_lora(model.encoder, r=4, lora_alpha=12)
        randomise_lora(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    jacobian = []
    for batch in TRAIN:
        for logits in model(**batch):
            for logit in logits:
                grads = torch.autograd.grad(logit, parameters, retain_graph=True, allow_unused=True)
                jacobian.append(torch.cat([g.flatten() for g in grads if g is not None]))
    jacobian = torch.stack(jacobian)  # (N C, p)
    found, features = empirical_ntk(model, TRAIN), all_features(model, TRAIN)
    theta = (found.pretrain + found.ft).reshape(15, 15)
    assert relative_error(theta, jacobian @ jacobian.T) < 1e-10
    for i in range(5):
        for j in range(5):
            expected = (features[i] @ features[j] + 1) * torch.eye(3, dtype=torch.double)
            assert torch.allclose(found.pretrain[i, :, j], expected, rtol=1e-12)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_eq_1_one_step_moves_logits_as_the_kernel_predicts(model, lora):
    """f(x) moves by lr * sum_i Theta(x, x_i) delta_i; what is left falls with lr squared."""
    if lora:
        add_lora(model.encoder, r=4, lora_alpha=12)
        randomise_lora(model)
    found = empirical_ntk(model, TRAIN, TEST)
    deltas = initial_deltas(all_logits(model, TRAIN), LABELS)
    for batches, test in ((TRAIN, False), (TEST, True)):
        errors = []
        for lr in (1e-4, 5e-5):
            moved = all_logits(after_one_step(model, lr, LABELS), batches) - all_logits(model, batches)
            predicted = predicted_logit_change(found, deltas, lr, test=test)
            errors.append(float((moved - predicted).norm()))
            assert errors[-1] < 0.1 * float(moved.norm())
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def predicted_feature_change(model, lr, labels):
    """eq. (2): lr * sum_i Theta_phi(x, x_i) V^T delta_i, by a Jacobian of the features."""
    parameters = {n: p.detach() for n, p in model.encoder.named_parameters()}

    def features(parameters):
        return torch.cat([torch.func.functional_call(model.encoder, parameters, (), b)[:, 0] for b in TRAIN])

    J = torch.func.jacrev(features)(parameters)
    J = torch.cat([j.flatten(2) for j in J.values()], 2)  # (N, h, p)
    pulled = initial_deltas(all_logits(model, TRAIN), labels) @ model.head.weight  # (N, h)
    return lr * torch.einsum("nhp,mkp,mk->nh", J, J, pulled)


def test_eq_2_one_step_moves_features_as_the_kernel_predicts(model):
    errors = []
    for lr in (1e-4, 5e-5):
        moved = all_features(after_one_step(model, lr, LABELS), TRAIN) - all_features(model, TRAIN)
        errors.append((moved - predicted_feature_change(model, lr, LABELS)).norm().item())
        assert errors[-1] < 0.1 * float(moved.norm())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def scale_head(model, factor):
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.head.weight *= factor
    return scaled


def test_f_is_quadratic_in_the_head_scale_and_p_does_not_depend_on_it(model):
    """F = V (...) V^T: three times the head is nine times F, and the same P."""
    one, three = empirical_ntk(model, TRAIN), empirical_ntk(scale_head(model, 3), TRAIN)
    assert relative_error(three.ft, 9 * one.ft) < 1e-12
    assert torch.equal(three.pretrain, one.pretrain)


def test_the_feature_step_is_linear_in_the_head_scale_at_equal_deltas(model):
    """eq. (2) with V larger and the delta of the unscaled head: autograd alone, no code of ours."""
    def step(factor):
        scaled, lr = scale_head(model, factor), 1e-6
        logits = torch.cat([scaled(**b) for b in TRAIN])
        fixed = initial_deltas(all_logits(model, TRAIN), LABELS)  # delta of the unscaled model
        logits.backward(-fixed)
        with torch.no_grad():
            for p in scaled.encoder.parameters():
                if p.grad is not None:
                    p -= lr * p.grad
        return all_features(scaled, TRAIN) - all_features(model, TRAIN)

    assert relative_error(step(2.0), 2 * step(1.0)) < 1e-3


class LinearModel(nn.Module):
    """f(x) = V B x + b: the linear feature extractor of Cor. 4.3 and Prop. 4.4."""

    def __init__(self, in_features, h, num_classes):
        super().__init__()
        self.encoder = nn.Linear(in_features, h, bias=False)
        self.head = nn.Linear(h, num_classes)

    def features(self, input_ids):
        return self.encoder(input_ids)

    def forward(self, input_ids):
        return self.head(self.features(input_ids))


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return LinearModel(20, 10, 3).double().eval()


def orthogonal_inputs():
    """8 training inputs and 4 inputs orthogonal to all of them, (8, 20) and (4, 20)."""
    q, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.double))
    return torch.randn(8, 8, dtype=torch.double) @ q[:8], torch.randn(4, 12, dtype=torch.double) @ q[8:]


def test_cor_4_3_features_of_inputs_orthogonal_to_training_do_not_move(linear):
    """FT moves B by multiples of training inputs, so B x stays where <x, x_i> = 0 for all i."""
    x, orthogonal = orthogonal_inputs()
    y = torch.arange(8) % 3
    before, moved_before = linear.features(orthogonal).detach(), linear.features(x).detach()
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(linear(x), y).backward()
        optimizer.step()
    assert (linear.features(orthogonal) - before).abs().max() < 1e-12
    assert (linear.features(x) - moved_before).norm(dim=1).min() > 0.1
    found = empirical_ntk(linear, [{"input_ids": x}], [{"input_ids": orthogonal}])
    assert found.test_ft.abs().max() < 1e-12 * found.ft.abs().max()


def test_sec_4_4_lp_keeps_growing_the_head_norm_once_it_separates():
    """d loss / d ||v_k|| along a fixed direction: positive first, negative once angles separate."""
    phi, y = torch.eye(3).double() + 0.1, torch.arange(3)
    good = torch.eye(3).double() - 1 / 3  # each v_k points to its own class

    def slope(directions):
        norm = torch.full((3,), 2.0, dtype=torch.double, requires_grad=True)
        unit = directions / directions.norm(dim=1, keepdim=True)
        loss = F.cross_entropy(phi @ (norm[:, None] * unit).T, y, reduction="sum")
        return torch.autograd.grad(loss, norm)[0]

    assert (slope(good) < 0).all()
    assert (slope(-good) > 0).all()


class LoRALinearModel(LinearModel):
    def __init__(self, linear, r, sigma):
        super().__init__(20, 10, 3)
        self.double().load_state_dict(linear.state_dict())
        self.encoder = LoRALinear(self.encoder, r, lora_alpha=r)
        nn.init.normal_(self.encoder.lora_A.weight, std=sigma)


def test_prop_4_4_lora_leaves_p_and_has_f_in_closed_form(linear):
    """F_LoRA(x, x') = <A x, A x'> V V^T (at B = 0, alpha = r), F_FT(x, x') = <x, x'> V V^T."""
    x = torch.randn(6, 20, dtype=torch.double)
    batch, V = [{"input_ids": x}], linear.head.weight.detach()
    lora = LoRALinearModel(linear, r=4, sigma=0.7).eval()
    full, low_rank = empirical_ntk(linear, batch), empirical_ntk(lora, batch)
    assert torch.allclose(low_rank.pretrain, full.pretrain, rtol=1e-12)
    A = lora.encoder.lora_A.weight.detach()
    assert relative_error(low_rank.ft, torch.einsum("nm,cd->ncmd", x @ A.T @ A @ x.T, V @ V.T)) < 1e-10
    assert relative_error(full.ft, torch.einsum("nm,cd->ncmd", x @ x.T, V @ V.T)) < 1e-10


def test_prop_4_4_f_under_lora_concentrates_as_one_over_root_r(linear):
    """<A x, A x'> / (sigma^2 r) deviates from <x, x'> with variance (|x|^2 |x'|^2 + <x, x'>^2) / r."""
    x, sigma = torch.randn(6, 20, dtype=torch.double), 0.7
    batch, gram = [{"input_ids": x}], x @ x.T
    full, norms = ntk_by_jacobian(linear, batch).ft, gram.diagonal()
    variance = float((norms[:, None] * norms + gram.square()).sum() / gram.square().sum())
    for r in (16, 64, 256):
        draws = [ntk_by_jacobian(LoRALinearModel(linear, r, sigma).eval(), batch).ft for _ in range(50)]
        deviation = sum(relative_error(d / (sigma**2 * r), full)**2 for d in draws) / 50
        assert deviation * r == pytest.approx(variance, rel=0.25), r


# ------------------------------------------------------------------------------------ statistics


def test_kernel_statistics_by_hand():
    """One sample, two classes, K = diag(3, 4): rank 2, norm 5, trace norm 7."""
    found = kernel_statistics(torch.diag(torch.tensor([3.0, 4.0])).view(1, 2, 1, 2))
    assert found["rank"] == 2 and found["frobenius"] == pytest.approx(5)
    assert found["trace_norms"].tolist() == [[pytest.approx(7)]]
    assert found["singular_values"].tolist() == [1, pytest.approx(0.75)]


def test_rank_counts_what_float32_can_tell_from_zero():
    """Above max(rows, columns) times float32's rounding of the largest singular value, as numpy has it."""
    threshold = 12 * torch.finfo(torch.float32).eps
    kernel = torch.zeros(2, 2, 6, 2, dtype=torch.double)  # 4 x 12
    for i, value in enumerate((1.0, 1.1 * threshold, 0.9 * threshold)):
        kernel.view(4, 12)[i, i] = value
    assert kernel_statistics(kernel)["rank"] == 2


def test_trace_norms_are_of_the_block_of_two_samples(model):
    kernel = empirical_ntk(model, TRAIN, TEST).test_ft  # 2 test and 5 training samples
    expected = torch.linalg.matrix_norm(kernel[1, :, 3], "nuc")
    found = kernel_statistics(kernel)["trace_norms"]
    assert found.shape == (2, 5) and float(found[1, 3]) == pytest.approx(float(expected))


def test_the_ft_ratio_is_the_share_of_f_in_the_first_step(model):
    """0 without F, 1 without P; else by a loop over samples."""
    found = empirical_ntk(model, TRAIN)
    deltas = initial_deltas(all_logits(model, TRAIN), LABELS)
    ratios = []
    for n in range(5):
        of_ft = sum(found.ft[n, :, i] @ deltas[i] for i in range(5))
        of_all = sum((found.pretrain + found.ft)[n, :, i] @ deltas[i] for i in range(5))
        ratios.append(float(of_ft.norm() / of_all.norm()))
    assert ft_ratio(found, deltas) == pytest.approx(sum(ratios) / 5)
    nothing = torch.zeros_like(found.ft)
    assert ft_ratio(ntk_file.NTK(found.pretrain, nothing), deltas) == 0
    assert ft_ratio(ntk_file.NTK(nothing, found.ft), deltas) == pytest.approx(1)


def test_deltas_are_minus_the_gradient_of_the_loss(model):
    logits = all_logits(model, TRAIN).requires_grad_()
    F.cross_entropy(logits, LABELS, reduction="sum").backward()
    assert torch.allclose(initial_deltas(logits.detach(), LABELS), -logits.grad)


def clusters(seed, spread, count=90, test_count=40):
    """(kernel, labels, test kernel, test labels) of points around three corners."""
    generator = torch.Generator().manual_seed(seed)
    eye = torch.eye(3, dtype=torch.double)
    labels = [torch.randint(3, (n,), generator=generator) for n in (count, test_count)]
    points = [eye[y] + spread * torch.randn(len(y), 3, generator=generator) for y in labels]
    kernels = [torch.einsum("nm,cd->ncmd", rows @ points[0].T, eye) for rows in points]
    return kernels[0], labels[0], kernels[1], labels[1]


def test_kernel_regression_reads_classes_from_a_kernel_that_knows_them():
    """A kernel of labelled clusters classifies test samples; one of noise is near chance."""
    found = kernel_regression(*clusters(0, 0.05))
    assert found["train_accuracy"] == found["test_accuracy"] == 1
    noise = kernel_regression(*clusters(0, 30.0))
    assert noise["test_accuracy"] < 0.6
    assert noise["test_logit_accuracy"] > noise["test_accuracy"]  # "no" is right two times in three


def test_kernel_regression_is_scikit_learns_on_rows_over_the_mean_diagonal():
    """Folds that never part the rows of a sample; the strength is the best by rows; classes by the larger score."""
    kernel, labels, test_kernel, test_labels = clusters(1, 0.6)
    found = kernel_regression(kernel, labels, test_kernel, test_labels)
    scale = kernel.flatten(2).flatten(0, 1).diagonal().mean()
    rows, test_rows = (k.flatten(2).flatten(0, 1) / scale for k in (kernel, test_kernel))
    targets, test_targets = (F.one_hot(y, 3).flatten() for y in (labels, test_labels))
    folds = PredefinedSplit(np.repeat(fold_of_samples(labels), 3))
    theirs = LogisticRegressionCV(Cs=10, cv=folds, tol=1e-8, max_iter=10_000, use_legacy_attributes=False,
                                  scoring="accuracy", l1_ratios=(0.0,)).fit(rows, targets)
    assert found["inverse_l2"] == pytest.approx(float(theirs.C_)) and 1e-4 < found["inverse_l2"] < 1e4
    for name, x, y, target in (("train", rows, labels, targets), ("test", test_rows, test_labels, test_targets)):
        scores = torch.from_numpy(theirs.decision_function(x))
        assert found[f"{name}_logit_accuracy"] == pytest.approx(float(((scores > 0) == target.bool()).double().mean()))
        assert found[f"{name}_accuracy"] == pytest.approx(float((scores.view(-1, 3).argmax(1) == y).double().mean()))
    assert found["test_accuracy"] < 1  # else every rule would do
    assert kernel_regression(1024 * kernel, labels, 1024 * test_kernel, test_labels) == found  # the unit is free


def fold_of_samples(labels):
    folds = np.empty(len(labels), dtype=int)
    for fold, (_, tested) in enumerate(StratifiedKFold(5).split(labels, labels)):
        folds[tested] = fold
    return folds


def test_kernel_regression_of_nothing_is_no_better_than_a_guess():
    """F of a head V = 0 is zero."""
    kernel, labels, test_kernel, test_labels = clusters(1, 0.6)
    found = kernel_regression(0 * kernel, labels, 0 * test_kernel, test_labels)
    assert found["test_accuracy"] < 0.6


@pytest.mark.cuda
def test_the_kernel_on_cuda_is_that_of_the_cpu(model):
    expected = empirical_ntk(model, TRAIN, TEST)
    found = empirical_ntk(model.float().cuda(), TRAIN, TEST)
    for part in PARTS:
        assert relative_error(getattr(found, part), getattr(expected, part)) < 1e-5
