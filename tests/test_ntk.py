"""The kernel against its definition, and the paper's theory as facts about small models, in float64."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import ntk as ntk_file
from data import encode
from model import Classifier, LoRALinear, add_lora
from plumbing import exact
from plumbing.checkpoint import load_pretrained
from ntk import (empirical_ntk, ft_ratio, initial_deltas, kernel_regression, kernel_statistics,
                 ntk_by_jacobian, predicted_feature_change, predicted_logit_change)

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


def random_head(C=3):
    return torch.randn(C, 64, dtype=torch.double) / 2


def lp_head():
    """LP's rows sum to zero."""
    weight = random_head()
    return weight - weight.mean(0)


HEADS = {"random": (random_head, 3), "LP": (lp_head, 2), "two classes": (lambda: random_head(2), 2),
         "rank 1": (lambda: random_head(3)[:, :1] * random_head(1), 1),
         "nearly rank 1": (lambda: random_head(3)[:, :1] * random_head(1) + 1e-4 * random_head(), 3)}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("head", HEADS)
def test_the_engine_computes_the_definition_in_the_rank_of_the_head(model, lora, head):
    """Prop. 4.1 by Jacobians and by blocks: the same four kernels, with one backward pass per rank of V."""
    weight, rank = HEADS[head][0](), HEADS[head][1]
    model.head = nn.Linear(64, len(weight)).double().eval()
    model.head.weight.data = weight
    if lora:
        add_lora(model.encoder, r=4, lora_alpha=12)
        randomise_lora(model)
    expected = ntk_by_jacobian(model, TRAIN, TEST)
    for dtype, tolerance in (torch.float64, 1e-12), (torch.float32, 1e-6):
        assert len(ntk_file.split_head(model.to(dtype).head.weight)[1]) == rank
        found = empirical_ntk(model, TRAIN, TEST)
        for part in PARTS:
            assert getattr(found, part).dtype == torch.float64
            assert relative_error(getattr(found, part), getattr(expected, part)) < tolerance, part


def test_a_head_of_zeros_has_no_f(model):
    """F = V (...) V^T: FT moves no feature before the head has moved."""
    nn.init.zeros_(model.head.weight)
    found = empirical_ntk(model, TRAIN, TEST)
    assert found.ft.shape == (5, 3, 5, 3) and not found.ft.any() and not found.test_ft.any()
    assert relative_error(found.pretrain, ntk_by_jacobian(model, TRAIN).pretrain) < 1e-12


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_engine_computes_the_definition_for_a_real_encoder(minilm, lora):
    """MiniLM-L6, 22.6 M parameters, with padding; one batch or many."""
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
        for batches in together, apart:
            found = empirical_ntk(model.to(dtype), batches[:-1], batches[-1:])
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


def test_another_pooling_needs_no_change_in_the_kernel(model):
    """The gradient of phi by the last hidden states comes from Classifier.pool."""
    model.encoder.config = replace(model.encoder.config, pooling="mean")
    expected, found = ntk_by_jacobian(model, TRAIN, TEST), empirical_ntk(model, TRAIN, TEST)
    for part in PARTS:
        assert relative_error(getattr(found, part), getattr(expected, part)) < 1e-12, part


@pytest.mark.parametrize("trained, blocks", [
    ("layers.1.ffn_out.weight", 1), ("layers.0.attention_norm.bias", 2), ("position_embeddings.weight", 3)])
def test_blocks_below_the_lowest_that_trains_are_not_walked(model, trained, blocks, monkeypatch):
    """What is frozen has no part in F: the gradient goes down no further than it must."""
    model.encoder.requires_grad_(False).get_parameter(trained).requires_grad_()
    walked, run_block = [], ntk_file.run_block
    monkeypatch.setattr(ntk_file, "run_block", lambda *args: walked.append(1) or run_block(*args))
    found, expected = empirical_ntk(model, TRAIN, TEST), ntk_by_jacobian(model, TRAIN, TEST)
    assert relative_error(found.test_ft, expected.test_ft) < 1e-12
    assert len(walked) == blocks * len(TRAIN + TEST)


def test_at_the_start_of_lora_f_is_the_kernel_of_b_alone(model):
    """A reaches the output through B = 0, so it has no gradient yet; B has one."""
    add_lora(model.encoder)
    both = empirical_ntk(model, TRAIN).ft
    for name, expected in (("lora_B", torch.zeros_like(both)), ("lora_A", both)):
        frozen = [module for path, module in model.named_modules() if path.endswith(name)]
        for module in frozen:
            module.requires_grad_(False)
        assert torch.allclose(empirical_ntk(model, TRAIN).ft, expected, rtol=1e-12, atol=0)
        for module in frozen:
            module.requires_grad_(True)
    assert both.norm() > 0


def test_a_kernel_of_more_than_one_tile(model):
    """The Gram product is cut into tiles of 128 rows: 65 training samples and 3 logits need two."""
    train, test = [make_batch([3, 4, 5] * 21 + [6, 7], 1)], [make_batch([5, 3], 2)]
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


def refuse_half(model):
    model.bfloat16()


@pytest.mark.parametrize("spoil, message", [
    (refuse_training, "encoder.layers.1 is in training mode"), (refuse_tied, "same tensor"),
    (refuse_bare, r"encoder \(Encoder\) owns the parameter scale"), (refuse_unknown, "Conv1d"),
    (refuse_frozen_head, "head is not a Linear with a bias that trains"), (refuse_no_bias, "head is not a Linear"),
    (refuse_pooler, r"pooler \(Conv1d\)"), (refuse_weight_norm, "owns the parameter weight_g"),
    (refuse_max_norm, "max_norm"), (refuse_scaled_gradients, "scale_grad_by_freq"),
    (refuse_half, "torch.bfloat16"),
])
def test_what_would_not_be_exact_is_refused_with_a_sentence(model, spoil, message):
    spoil(model)
    with pytest.raises(ValueError, match=message):
        empirical_ntk(model, TRAIN)


def test_autocast_inference_mode_and_batches_of_the_wrong_kind_are_refused(model):
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        empirical_ntk(model, TRAIN)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        empirical_ntk(model, TRAIN)
    with pytest.raises(ValueError, match="at least one training batch"):
        empirical_ntk(model, [])
    with pytest.raises(ValueError, match="expected lists of batches"):
        empirical_ntk(model, TRAIN, TEST[0])


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
    model, check = model.float(), exact.spot_check

    def spoiled(model, batches, N, pretrain, ft):
        row, column = {"first": (0, 0), "last": (N - 1, N - 1), "test": (-1, 0)}[wrong]
        ft[row, :, column] *= 1.01
        check(model, batches, N, pretrain, ft)

    monkeypatch.setattr(exact, "spot_check", spoiled)
    with pytest.raises(ArithmeticError, match="F and autograd differ"):
        empirical_ntk(model, TRAIN, TEST)


def test_the_spot_check_looks_at_the_last_logit_too_and_does_not_let_nan_pass(model, monkeypatch):
    check, last = exact.spot_check, model.head.out_features - 1

    def spoiled(model, batches, N, pretrain, ft):
        ft[N - 1, last, N - 1, last] = value
        check(model, batches, N, pretrain, ft)

    monkeypatch.setattr(exact, "spot_check", spoiled)
    for value in (0.0, float("nan")):
        with pytest.raises(ArithmeticError, match="F and autograd differ"):
            empirical_ntk(model, TRAIN, TEST)


def test_the_predicted_change_of_features_is_in_full_precision_and_of_an_exact_model(model):
    """As the kernel itself: eq. (2) of a model in train mode would be random."""
    seen, deltas = set(), torch.zeros(sum(len(b["input_ids"]) for b in TRAIN), model.head.out_features)
    model.encoder.layers[0].ffn_in.register_forward_hook(lambda *_: seen.add(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high")
    try:
        predicted_feature_change(model, TRAIN, deltas, 0.1, TEST)
        assert seen == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    with pytest.raises(ValueError, match="training mode"):
        predicted_feature_change(model.train(), TRAIN, deltas, 0.1, TEST)


def use_a_weight_twice(model):
    """Hooks see a layer's own call alone; autograd sees every use."""
    forward = model.encoder.forward
    model.encoder.forward = lambda *args, **kwargs: (forward(*args, **kwargs)
                                                     + model.encoder.layers[0].ffn_in.weight.sum())


def call_a_layer_twice(model):
    attention = model.encoder.layers[0].attention
    forward = attention.forward
    attention.forward = lambda x, *more: forward(forward(x, *more), *more)


def change_an_output_in_place(model):
    model.encoder.layers[0].attention.query.register_forward_hook(lambda module, args, output: output.mul_(2))


def let_samples_meet(model):
    model.encoder.layers[0].ffn_in.register_forward_hook(lambda module, args, output: output + output.mean(0))


@pytest.mark.parametrize("spoil", [use_a_weight_twice, call_a_layer_twice, change_an_output_in_place,
                                   let_samples_meet])
def test_the_spot_check_finds_a_model_that_the_block_walk_cannot_follow(model, spoil):
    spoil(model)
    with pytest.raises(ArithmeticError, match="spot check"):
        empirical_ntk(model, TRAIN)


# ------------------------------------------------------------------------------------ the layer kernels


def two_batches(*widths):
    """Random tensors of 3 samples at 4 positions and 2 at 7, each (n, T, width) or (n, r, T, width)."""
    return [[torch.randn(n, *width[:-1], T, width[-1], dtype=torch.double) for n, T in ((3, 4), (2, 7))]
            for width in widths]


def kernel_of(J, columns):
    """J J^T of one J (r, p) per sample, (R r, N r)."""
    J = torch.stack(J).flatten(0, 1)
    return J @ J[:columns].T


@pytest.mark.parametrize("numbers", [7, 140, 2**15])
def test_the_kernel_of_a_linear_layer_is_that_of_the_sum_of_g_a(numbers, monkeypatch):
    """J = sum_t g_t a_t^T, one or two of its five rows at a time, or whole; 4 samples train, 1 tests."""
    monkeypatch.setattr(ntk_file, "MAX_NUMBERS", (numbers, numbers))
    (a, g), kernel = two_batches((6,), (2, 5)), torch.zeros(10, 8, dtype=torch.double)
    ntk_file.linear_kernel(kernel, nn.Linear(6, 5), a, g)
    J = [torch.einsum("rto,ti->roi", *pair).flatten(1) for g_, a_ in zip(g, a) for pair in zip(g_, a_)]
    assert torch.allclose(kernel.tril(), kernel_of(J, 8).tril(), rtol=1e-12)


def test_with_one_position_the_linear_kernel_is_a_product_of_two_kernels():
    """J J^T = <a, a'> <g, g'>."""
    a, g = [torch.randn(5, 1, 6, dtype=torch.double)], [torch.randn(5, 2, 1, 4, dtype=torch.double)]
    kernel = torch.zeros(10, 8, dtype=torch.double)
    ntk_file.linear_kernel(kernel, nn.Linear(6, 4), a, g)
    J = [torch.einsum("rto,ti->roi", *pair).flatten(1) for pair in zip(g[0], a[0])]
    assert torch.allclose(kernel, kernel_of(J, 8), rtol=1e-12)


def test_the_jacobian_of_a_layernorm_weight_is_the_sum_of_g_times_x_hat():
    layer, a, g = nn.LayerNorm(6, eps=0.1).double(), *(t[0] for t in two_batches((6,), (2, 6)))
    found = ntk_file.layernorm_jacobian(layer, a, g)  # (3, 2, 6)
    for n in range(3):
        for k in range(2):
            expected = torch.autograd.grad(layer(a[n]), layer.weight, g[n, k])[0]
            assert torch.allclose(found[n, k], expected, rtol=1e-12)


def test_the_kernel_of_an_embedding_meets_in_the_ids_that_two_samples_share():
    """Ids of one sample, of some and of all, twice in one text, and the padding id, which has no gradient."""
    ids = [torch.tensor([[1, 2, 2, 0], [1, 3, 0, 0], [1, 4, 5, 6]]), torch.tensor(2 * [[1, 2, 3, 4, 7, 8, 9]])]
    g, kernel = two_batches((2, 5))[0], torch.zeros(10, 8, dtype=torch.double)
    ntk_file.embedding_kernel(kernel, nn.Embedding(10, 5, padding_idx=0), ids, g)
    J = [torch.einsum("rth,tv->rvh", g_x, F.one_hot(x, 10).double() * (x != 0)[:, None]).flatten(1)
         for some, g_some in zip(ids, g) for x, g_x in zip(some, g_some)]
    assert torch.allclose(kernel.tril(), kernel_of(J, 8).tril(), rtol=1e-12)


@pytest.mark.parametrize("rows", [5, 64, 127, 128, 192, 300])
def test_the_gram_product_fills_the_lower_triangle_and_the_rows_of_test_samples(rows):
    """In products of 64 to 127 rows, and in float64 where there are few rows: BLAS is less exact there."""
    J = torch.randn(rows + 10, 50_000) + 0.5
    kernel, expected = torch.zeros(rows + 10, rows, dtype=torch.double), J.double() @ J[:rows].double().T
    exact.add_gram(kernel, J)
    assert relative_error(kernel.tril(), expected.tril()) < 3e-7


def test_singular_values_are_relative_to_the_largest_however_small_it_is():
    kernel = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0])).view(2, 2, 2, 2)
    for scale in (1e-6, 1e6):
        assert kernel_statistics(scale * kernel)["singular_values"].tolist() == pytest.approx([1, 0.5, 0.25, 0.25])


def test_long_sums_are_cut_into_short_ones(monkeypatch):
    """One float32 sum of a million terms loses digits that sums of 2^15 in float64 keep."""
    J = torch.rand(64, 2**20) + 0.5
    kernel, expected = torch.zeros(64, 64, dtype=torch.double), J.double() @ J.double().T
    exact.add_gram(kernel, J)
    in_one = relative_error((J @ J.T).double().tril(), expected.tril())
    assert relative_error(kernel.tril(), expected.tril()) < min(1e-7, 0.5 * in_one)


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


def feature_jacobian(model, batches):
    """dphi/dtheta_phi of each sample, (N, h, p)."""
    parameters = {n: p.detach() for n, p in model.encoder.named_parameters() if p.requires_grad}

    def features(parameters):
        hidden = [torch.func.functional_call(model.encoder, parameters, (), b) for b in batches]
        return torch.cat([model.pool(x, b["attention_mask"]) for x, b in zip(hidden, batches)])

    return torch.cat([J.flatten(2) for J in torch.func.jacrev(features)(parameters).values()], 2)


@pytest.mark.parametrize("lora, pooling", [(False, "first"), (True, "first"), (False, "mean")])
def test_eq_2_one_step_moves_features_as_the_kernel_predicts(model, lora, pooling):
    """phi(x) moves by lr * sum_i Theta_phi(x, x_i) V^T delta_i; what is left falls with lr squared."""
    model.encoder.config = replace(model.encoder.config, pooling=pooling)
    if lora:
        add_lora(model.encoder)
        randomise_lora(model)
    deltas = initial_deltas(all_logits(model, TRAIN), LABELS)
    J, J_test = feature_jacobian(model, TRAIN), feature_jacobian(model, TEST)  # (N, h, p), (M, h, p)
    for batches, rows in ((TRAIN, J), (TEST, J_test)):
        expected = torch.einsum("mhp,nkp,nk->mh", rows, J, deltas @ model.head.weight.detach())
        errors = []
        for lr in (1e-4, 5e-5):
            predicted = predicted_feature_change(model, TRAIN, deltas, lr, batches)
            assert relative_error(predicted, lr * expected) < 1e-12
            moved = all_features(after_one_step(model, lr, LABELS), batches) - all_features(model, batches)
            errors.append(float((moved - predicted).norm()))
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


class LinearExtractor(nn.Module):
    """phi(x) = B x, as an encoder without layers: of its one block, the embeddings."""

    def __init__(self, in_features, h):
        super().__init__()
        self.linear, self.layers = nn.Linear(in_features, h, bias=False), nn.ModuleList()

    def embed(self, input_ids):
        return self.linear(input_ids[:, None])  # (N, 1, h)

    forward = embed


class LinearModel(nn.Module):
    """f(x) = V B x + b: the linear feature extractor of Cor. 4.3 and Prop. 4.4."""

    def __init__(self, in_features, h, num_classes):
        super().__init__()
        self.encoder = LinearExtractor(in_features, h)
        self.head = nn.Linear(h, num_classes)

    def features(self, input_ids):
        return self.pool(self.encoder(input_ids))

    def pool(self, hidden, attention_mask=None):
        return hidden[:, 0]

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
    train, test = [{"input_ids": x}], [{"input_ids": orthogonal}]
    found, deltas = empirical_ntk(linear, train, test), initial_deltas(linear(x).detach(), y)
    assert found.test_ft.abs().max() < 1e-12 * found.ft.abs().max()
    assert predicted_feature_change(linear, train, deltas, 0.1, test).abs().max() < 1e-12


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
        self.encoder.linear = LoRALinear(self.encoder.linear, r, lora_alpha=r)
        nn.init.normal_(self.encoder.linear.lora_A.weight, std=sigma)


def test_prop_4_4_lora_leaves_p_and_has_f_in_closed_form(linear):
    """F_LoRA(x, x') = <A x, A x'> V V^T (at B = 0, alpha = r), F_FT(x, x') = <x, x'> V V^T."""
    x = torch.randn(6, 20, dtype=torch.double)
    batch, V = [{"input_ids": x}], linear.head.weight.detach()
    lora = LoRALinearModel(linear, r=4, sigma=0.7).eval()
    full, low_rank = empirical_ntk(linear, batch), empirical_ntk(lora, batch)
    assert torch.allclose(low_rank.pretrain, full.pretrain, rtol=1e-12)
    A = lora.encoder.linear.lora_A.weight.detach()
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
    """One sample, two classes, K = diag(3, 4): rank 2, norm 5."""
    found = kernel_statistics(torch.diag(torch.tensor([3.0, 4.0])).view(1, 2, 1, 2))
    assert found["rank"] == 2 and found["frobenius"] == pytest.approx(5)
    assert found["singular_values"].tolist() == [1, pytest.approx(0.75)]


def test_rank_counts_what_float32_can_tell_from_zero():
    """Above max(rows, columns) times float32's rounding of the largest singular value, as numpy has it."""
    threshold = 12 * torch.finfo(torch.float32).eps
    kernel = torch.zeros(2, 2, 6, 2, dtype=torch.double)  # 4 x 12
    for i, value in enumerate((1.0, 1.1 * threshold, 0.9 * threshold)):
        kernel.view(4, 12)[i, i] = value
    assert kernel_statistics(kernel)["rank"] == 2


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
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import PredefinedSplit

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
    for fold, (_, tested) in enumerate(pytest.importorskip("sklearn.model_selection").StratifiedKFold(5).split(labels, labels)):
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
