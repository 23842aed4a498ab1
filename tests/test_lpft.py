"""LP against scikit-learn, the FT stage's promises, calibration and feature statistics."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lpft
from data import load_task, tiny, training_batches
from lpft import (accuracy, calibration_error, feature_statistics, fine_tune, fit_linear_probe,
                  fit_temperature, matthews, predict, set_head, train_epoch, why_no_temperature)
from lpft import stratified_folds
from model import Classifier, add_lora
from plumbing import devices, newton
from plumbing.checkpoint import load_pretrained


def samples(n, h, num_classes, seed=0):
    """Correlated features with labels that they explain in part."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, h, generator=generator) @ torch.randn(h, h, generator=generator) / h**0.5 + 0.3
    noisy = x[:, :num_classes] + 0.7 * torch.randn(n, num_classes, generator=generator)
    return x, noisy.argmax(1)


def objective(weight, bias, inverse_l2, x, y):
    """scikit-learn's: C * summed loss + half the squared norm (of the one vector for two classes)."""
    x, weight, bias = x.double(), torch.as_tensor(weight).double(), torch.as_tensor(bias).double()
    if len(weight) == 1:  # scikit-learn's two classes: logits are 0 and w.x + b
        logits = torch.cat([torch.zeros(len(x), 1).double(), x @ weight.T + bias], 1)
        penalty = 0.5 * weight.square().sum()
    else:
        logits = x @ weight.T + bias
        penalty = (1.0 if len(weight) == 2 else 0.5) * weight.square().sum()
    return inverse_l2 * F.cross_entropy(logits, y, reduction="sum") + penalty


# ------------------------------------------------------------------------------------ LP


@pytest.mark.parametrize("scoring, theirs", [("accuracy", "accuracy"), ("log-loss", "neg_log_loss")])
@pytest.mark.parametrize("n, h, num_classes", [(150, 20, 3), (120, 16, 2), (60, 90, 4)])
def test_lp_is_scikit_learns_cross_validated_logistic_regression(n, h, num_classes, scoring, theirs):
    """Same strength chosen, same minimum of the same objective; also with more features than samples."""
    x, y = samples(n, h, num_classes)
    probe = fit_linear_probe(x, y, num_classes, scoring=scoring)
    linear_model = pytest.importorskip("sklearn.linear_model")
    reference = linear_model.LogisticRegressionCV(Cs=10, cv=5, scoring=theirs, tol=1e-9, max_iter=20_000,
                                     l1_ratios=(0,), use_legacy_attributes=False)
    reference.fit(x.double().numpy(), y.numpy())
    assert probe.inverse_l2 == pytest.approx(reference.C_)
    mine = objective(probe.weight, probe.bias, probe.inverse_l2, x, y)
    assert mine <= objective(reference.coef_, reference.intercept_, probe.inverse_l2, x, y) * (1 + 1e-6)
    if num_classes == 2:
        expected = np.concatenate([-reference.coef_ / 2, reference.coef_ / 2])
    else:
        expected = reference.coef_
    np.testing.assert_allclose(probe.weight, expected, atol=1e-4)


@pytest.mark.parametrize("scoring, theirs", [("accuracy", "accuracy"), ("log-loss", "neg_log_loss")])
def test_the_score_of_each_strength_is_the_sum_of_the_means_of_folds_that_differ_in_size(scoring, theirs):
    """83 samples make folds of 17 and of 16, which count alike. All ten scores are scikit-learn's."""
    x, y = samples(83, 10, 3)
    linear_model = pytest.importorskip("sklearn.linear_model")
    reference = linear_model.LogisticRegressionCV(Cs=10, cv=5, scoring=theirs, solver="newton-cholesky", tol=1e-10,
                                     l1_ratios=(0,), use_legacy_attributes=False)
    reference.fit(x.double().numpy(), y.numpy())
    expected = np.asarray(reference.scores_).reshape(5, 10).sum(0)
    np.testing.assert_allclose(fit_linear_probe(x, y, 3, scoring=scoring).scores, expected, rtol=1e-5)


@pytest.mark.parametrize("inverse_l2", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_lp_ends_where_the_gradient_vanishes(inverse_l2, num_classes):
    """Below 1e-6 of the gradient at V = 0, for weak and for strong penalties."""
    x, y = samples(200, 30, num_classes)
    probe = fit_linear_probe(x, y, num_classes, inverse_l2)

    def gradient_norm(weight, bias):
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        grads = torch.autograd.grad(objective(weight, bias, inverse_l2, x, y), (weight, bias))
        return math.hypot(*(float(g.norm()) for g in grads))

    start = gradient_norm(torch.zeros_like(probe.weight), torch.zeros_like(probe.bias))
    assert gradient_norm(probe.weight, probe.bias) < 1e-6 * start


@pytest.mark.parametrize("seed", range(3))
def test_folds_are_those_of_scikit_learn(seed):
    y = torch.randint(0, 4, (83,), generator=torch.Generator().manual_seed(seed))
    folds = stratified_folds(y)
    model_selection = pytest.importorskip("sklearn.model_selection")
    for number, (_, held_out) in enumerate(model_selection.StratifiedKFold(5).split(np.zeros(83), y.numpy())):
        assert (folds == number).nonzero().flatten().tolist() == held_out.tolist()


def test_lp_refuses_what_it_cannot_fit():
    x, y = samples(100, 5, 2)
    with pytest.raises(ValueError, match="class 1 has 3"):
        fit_linear_probe(x[:20], torch.tensor([0] * 17 + [1] * 3), 2)
    with pytest.raises(ValueError, match="no sample of class 2"):
        fit_linear_probe(x, y, 3, inverse_l2=1.0)
    with pytest.raises(ValueError, match="NaN"):
        fit_linear_probe(x.fill_(math.nan), y, 2)


def test_the_path_of_lp_starts_at_zero_and_ends_at_the_head():
    """Fig. 1: the head norm grows from 0 while the training accuracy rises."""
    x, y = samples(60, 8, 3)
    probe = fit_linear_probe(x, y, 3, inverse_l2=10.0)
    norms, accuracies = zip(*probe.path)
    assert norms[0] == 0 and norms[-1] == pytest.approx(float(probe.weight.norm()))
    logits = x.double() @ probe.weight.T + probe.bias
    assert accuracies[-1] == pytest.approx(accuracy(logits, y)) and accuracies[-1] > accuracies[0]


@pytest.mark.parametrize("seed", [8, 15, 16, 28])
def test_lp_converges_on_few_distinct_samples(seed):
    """Two texts, often repeated: softmax is blind to one direction of the bias, where rounding must not grow."""
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed)).repeat(18, 1)
    y = torch.tensor([0, 1]).repeat(18)
    probe = fit_linear_probe(x, y, 2)
    theirs = pytest.importorskip("sklearn.linear_model").LogisticRegression(C=probe.inverse_l2, tol=1e-10, max_iter=10_000).fit(x, y)
    ours = objective(probe.weight, probe.bias, probe.inverse_l2, x, y)
    assert ours <= objective(theirs.coef_, theirs.intercept_, probe.inverse_l2, x, y) * (1 + 1e-9)


def test_lp_on_features_that_say_nothing_is_a_head_of_zeros():
    """Balanced classes, one and the same feature: V = 0 is the solution, up to rounding."""
    probe = fit_linear_probe(torch.ones(60, 10), torch.arange(60) % 3, 3)
    assert probe.weight.abs().max() < 1e-9 and probe.bias.abs().max() < 1e-9


# ------------------------------------------------------------------------------------ FT


@pytest.fixture(scope="module")
def small_task():
    return load_task("tiny-120", tiny.make_tokenizer(), max_train=60)


@pytest.fixture
def model(random_folder):
    encoder, _ = load_pretrained(random_folder)
    torch.manual_seed(0)
    return Classifier(encoder, 3)


def test_lp_leaves_the_encoder_bitwise_unchanged(model, small_task):
    train = small_task.splits["train"]
    before = copy.deepcopy(model.encoder.state_dict())
    set_head(model, fit_linear_probe(predict(model, train)[0], train.labels, 3))
    assert all(torch.equal(before[name], t) for name, t in model.encoder.state_dict().items())


@pytest.mark.parametrize("lora", [False, True])
def test_lp_ft_starts_from_the_logits_of_lp(model, small_task, lora):
    """Before its first step the FT stage computes what the probe computes (LoRA: the same)."""
    train, val = small_task.splits["train"], small_task.splits["val"]
    features, _ = predict(model, train)
    probe = fit_linear_probe(features, train.labels, 3)
    set_head(model, probe)
    if lora:
        add_lora(model.encoder, r=4, lora_alpha=12)
    logits = features.double() @ probe.weight.T + probe.bias  # (N, C)
    summed = features.double().abs() @ probe.weight.abs().T  # what float32 rounds, even if it cancels
    assert ((predict(model, train)[1] - logits).abs() < 1e-6 * summed).all()
    history = fine_tune(model, train, val, lr=1e-3, batch_size=8, epochs=1)
    assert history[0]["epoch"] == 0
    assert history[0]["loss"] == pytest.approx(float(F.cross_entropy(
        features.double() @ probe.weight.T + probe.bias, train.labels)), abs=1e-5)


def test_lora_moves_its_matrices_and_the_head_and_nothing_else(model, small_task):
    add_lora(model.encoder, r=4, lora_alpha=12)
    before = copy.deepcopy(model.state_dict())
    fine_tune(model, small_task.splits["train"], small_task.splits["val"], lr=1e-2, batch_size=8, epochs=1)
    moved = {name for name, t in model.state_dict().items() if not torch.equal(before[name], t)}
    assert moved and all("lora_" in name or name.startswith("head.") for name in moved)
    assert {"head.weight", "head.bias"} <= moved


def test_without_flags_the_ft_stage_has_ten_epochs_and_seed_zero(model, small_task):
    train, val, start = small_task.splits["train"], small_task.splits["val"], copy.deepcopy(model.state_dict())
    histories = []
    for how in ({}, {"epochs": 10, "seed": 0}):
        model.load_state_dict(start)
        torch.manual_seed(0)
        histories.append(fine_tune(model, train, val, lr=1e-3, batch_size=30, **how))
    assert histories[0] == histories[1] and len(histories[0]) == 1 + 10


def test_the_best_validation_epoch_is_kept(model, small_task):
    """A huge learning rate makes epochs differ; the model afterwards is that of the first best one."""
    train, val = small_task.splits["train"], small_task.splits["val"]
    seen = []
    history = fine_tune(model, train, val, lr=2e-2, batch_size=8, epochs=4,
                        on_epoch=lambda record: seen.append(copy.deepcopy(model.state_dict())))
    scores = [record["val_accuracy"] for record in history[1:]]
    assert max(scores) > min(scores)
    kept = seen[1 + scores.index(max(scores))]
    assert all(torch.equal(kept[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("num_classes", [2, 3])
def test_matthews_correlation_is_scikit_learns(num_classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, num_classes, generator=generator)
    labels = torch.where(torch.rand(200, generator=generator) < 0.5, logits.argmax(1),
                         torch.randint(num_classes, (200,), generator=generator))
    assert matthews(logits, labels) == pytest.approx(pytest.importorskip("sklearn.metrics").matthews_corrcoef(labels, logits.argmax(1)))
    assert 0.3 < matthews(logits, labels) < matthews(logits, logits.argmax(1)) == pytest.approx(1)


def test_matthews_gives_nothing_for_the_majority_where_accuracy_does():
    """Why CoLA is not scored by accuracy: nine of ten by always saying yes."""
    labels = torch.tensor([1] * 9 + [0])
    always_yes = torch.tensor([[0.0, 1.0]]).expand(10, 2)
    assert accuracy(always_yes, labels) == 0.9 and matthews(always_yes, labels) == 0.0


def test_the_ft_stage_is_adam_with_linear_decay_and_clipping(model, small_task):
    """Against a plain loop with torch.optim.Adam, same batches, dropout 0."""
    for module in model.modules():
        if hasattr(module, "p") or hasattr(module, "dropout"):
            module.p = 0.0
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
    train, val = small_task.splits["train"], small_task.splits["val"]
    reference, steps = copy.deepcopy(model).train(), 2 * math.ceil(60 / 16)
    optimizer, step = torch.optim.Adam(reference.parameters(), lr=1e-3), 0
    for epoch in (1, 2):
        generator = torch.Generator().manual_seed(7000 + epoch)
        for indices in training_batches(train.lengths, 16, generator):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
            batch, labels = train.batch(indices)
            optimizer.zero_grad()
            F.cross_entropy(reference(**batch), labels).backward()
            grads = [p.grad for p in reference.parameters() if p.grad is not None]
            norm = torch.stack([g.norm() for g in grads]).norm()
            for g in grads:
                g.mul_(min(1.0, 1.0 / (float(norm) + 1e-6)))
            optimizer.step()
            step += 1
    states = []
    fine_tune(model, train, val, lr=1e-3, batch_size=16, epochs=2, seed=7,
              on_epoch=lambda record: states.append(copy.deepcopy(model.state_dict())))
    for name, expected in reference.state_dict().items():
        assert torch.allclose(states[-1][name], expected, atol=2e-5), name


def test_a_start_that_is_not_finite_is_refused_before_the_first_step(model, small_task):
    model.head.bias.data.fill_(math.inf)
    with pytest.raises(lpft.NotFinite, match="in epoch 0") as refused:
        fine_tune(model, small_task.splits["train"], small_task.splits["val"], lr=1e-3, batch_size=8)
    assert not refused.value.kept


def test_a_step_that_goes_too_far_is_halved(monkeypatch):
    """A first step of 1000 times the right length raises the objective; halved until it does not, it leads there."""
    x, y = samples(60, 5, 3)
    expected, solve, calls = fit_linear_probe(x, y, 3, inverse_l2=1.0), newton.conjugate_gradients, []

    def far_at_first(*some):
        calls.append(1)
        return (1000 if len(calls) == 1 else 1) * solve(*some)

    monkeypatch.setattr(newton, "conjugate_gradients", far_at_first)
    found = fit_linear_probe(x, y, 3, inverse_l2=1.0)
    assert (found.weight - expected.weight).norm() < 1e-6 * expected.weight.norm() and found.path[1][0] < 5 * found.path[-1][0]


def test_a_single_sample_of_a_class_is_enough_for_a_fixed_strength():
    x, _ = samples(10, 5, 2)
    assert fit_linear_probe(x, torch.tensor([0] * 9 + [1]), 2, inverse_l2=1.0).weight.norm() > 0


def test_the_best_weights_come_back_where_only_some_are_trained(model, small_task, monkeypatch):
    """Under LoRA the kept weights are A, B and the head; the frozen ones are not among them."""
    add_lora(model.encoder, r=4, lora_alpha=12)
    train_epoch, epochs = lpft.train_epoch, []

    def ruined_in_epoch_2(model, *more):
        epochs.append(1)
        measured = train_epoch(model, *more)
        return (math.nan, measured[1]) if len(epochs) == 2 else measured

    monkeypatch.setattr(lpft, "train_epoch", ruined_in_epoch_2)
    with pytest.raises(lpft.NotFinite, match="in epoch 2") as refused:
        fine_tune(model, small_task.splits["train"], small_task.splits["val"], lr=1e-3, batch_size=8)
    assert refused.value.kept


def test_lp_that_does_not_converge_says_so(monkeypatch):
    """A solver that takes no step is at its start for ever; no half-fitted head comes out."""
    monkeypatch.setattr(newton, "conjugate_gradients", lambda times, right, diagonal, precision: 0 * right)
    x, y = samples(60, 5, 3)
    with pytest.raises(ArithmeticError, match="did not converge at inverse_l2 1"):
        fit_linear_probe(x, y, 3, inverse_l2=1.0)


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_learning_rate(model, small_task):
    with pytest.raises(ValueError, match="--lr 1e.30"):
        fine_tune(model, small_task.splits["train"], small_task.splits["val"], lr=1e30, batch_size=8)


def test_an_epoch_whose_last_step_ruins_the_weights_is_never_the_best(model, small_task, monkeypatch):
    """Every loss was finite; the logits are not, and argmax of NaN is class 0, which has many samples."""
    train_epoch, good = lpft.train_epoch, []

    def ruined_in_epoch_2(model, *more):
        measured = train_epoch(model, *more)
        if good:
            model.head.weight.data.fill_(math.nan)
        else:
            good.append(model.head.weight.detach().clone())
        return measured

    monkeypatch.setattr(lpft, "train_epoch", ruined_in_epoch_2)
    with pytest.raises(lpft.NotFinite, match="NaN in epoch 2, at --lr 0.001") as end:
        fine_tune(model, small_task.splits["train"], small_task.splits["val"], lr=1e-3, batch_size=8, epochs=3)
    assert end.value.kept and torch.equal(model.head.weight, good[0])


def test_a_gradient_that_is_not_finite_beside_a_finite_loss_ends_the_run_too(model, small_task, monkeypatch):
    """Clipping would divide by its infinite norm: a step of zeros, and nobody would know."""
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def infinite_once(*arguments, **more):
        steps.append(1)
        return clip(*arguments, **more) + (math.inf if len(steps) == 3 else 0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", infinite_once)
    with pytest.raises(lpft.NotFinite, match="in epoch 1"):
        fine_tune(model, small_task.splits["train"], small_task.splits["val"], lr=1e-3, batch_size=8, epochs=1)


def test_predictions_come_in_the_order_of_the_split(model, small_task):
    """Batches are sorted by length inside; the result is not."""
    split = small_task.splits["val"]
    features, logits = predict(model, split, batch_size=7)
    batch, _ = split.batch([11, 3])
    with torch.no_grad():
        assert torch.allclose(model.eval().features(**batch), features[[11, 3]], atol=1e-5)
        assert torch.allclose(model(**batch), logits[[11, 3]], atol=1e-5)


def test_on_a_cpu_a_batch_is_as_long_as_its_longest_text(small_task):
    """A GPU's is a multiple of 8 tokens, as it looks for its fastest kernels for every new shape."""
    split = small_task.splits["train"]
    batch, labels = devices.batch_of(split, [3, 5], torch.device("cpu"))
    assert batch["input_ids"].shape == (2, split.lengths[[3, 5]].max()) and batch["input_ids"].shape[1] % 8
    assert torch.equal(labels, split.labels[[3, 5]]) and {*batch} == {"input_ids", "attention_mask", "token_type_ids"}


# ------------------------------------------------------------------------------------ calibration


def calibrated_logits(n=20_000, num_classes=3):
    """Logits whose softmax is the distribution that the labels are drawn from: T = 1 is right."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, num_classes, generator=generator, dtype=torch.double)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("scale", [0.1, 0.5, 1, 3, 10, 98, 100])
def test_temperature_recovers_a_known_scale(scale):
    """Logits that are `scale` times too large need T = scale: Sec. 4.6, within 1 %."""
    logits, labels = calibrated_logits()
    true = fit_temperature(logits, labels)
    assert fit_temperature(scale * logits, labels) == pytest.approx(scale * true, rel=1e-9)
    large, labels = calibrated_logits(200_000)
    assert fit_temperature(scale * large, labels) == pytest.approx(scale, rel=0.01)


def test_temperature_is_the_minimum_of_the_cross_entropy():
    logits, labels = calibrated_logits(500)
    t = fit_temperature(7 * logits, labels)
    loss = [float(F.cross_entropy(7 * logits / (t * factor), labels)) for factor in (0.99, 1, 1.01)]
    assert loss[1] < min(loss[0], loss[2])
    rounded = (7 * logits).float()  # as a model gives them: the search is in float64 all the same
    assert fit_temperature(rounded, labels) == pytest.approx(fit_temperature(rounded.double(), labels), rel=1e-12)


@pytest.mark.parametrize("case", ["all right", "all wrong", "one sample", "chance"])
def test_temperature_is_never_worse_than_one(case):
    logits, labels = calibrated_logits(1 if case == "one sample" else 50)
    labels = {"all right": logits.argmax(1), "all wrong": logits.argmin(1)}.get(case, labels)
    if case == "chance":
        labels = labels.roll(1)
    t = fit_temperature(logits, labels)
    assert t > 0 and math.isfinite(t)
    assert F.cross_entropy(logits / t, labels) <= F.cross_entropy(logits, labels)


@pytest.mark.parametrize("margin", [1e-9, 2, 1e9])
def test_temperature_is_that_of_paper_and_pencil(margin):
    """Two classes, all margins m, three of four right: 1 / (1 + exp(-m / T)) = 3/4, so T = m / log 3."""
    logits = margin * torch.tensor([[1.0, 0.0]] * 4).double()
    assert fit_temperature(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx(margin / math.log(3), rel=1e-11)


@pytest.mark.parametrize("logits, labels, reason", [
    ([[2, 0, 0], [0, 1, 0]], [0, 1], "every validation sample is right"),
    ([[2, 2, 0], [0, 1, 0]], [0, 1], "every validation sample is right"),  # or as sure of another class
    ([[2, 0, 0], [0, 1, 0]], [1, 2], "no better than chance"),
    ([[2, 0, 0], [0, 1, 0]], [1, 1], "no better than chance"),  # one right, but less sure than the wrong one
    ([[0.7, 0.7, 0.7], [0.1, 0.1, 0.1]], [0, 1], "no better than chance"),
    ([[0, 0, 0], [0, 0, 0]], [0, 1], "no better than chance"),
    ([[2, 0, 0], [0, 1, 0]], [0, 0], None)])
def test_where_no_temperature_is_best_it_stays_one_and_says_why(logits, labels, reason):
    """The loss then falls all the way to T = 0 or to T = infinity: a T from such a search means nothing."""
    logits, labels = torch.tensor(logits).double(), torch.tensor(labels)
    found, t = why_no_temperature(logits, labels), fit_temperature(logits, labels)
    losses = [float(F.cross_entropy(logits / t, labels)) for t in np.geomspace(0.05, 1e4, 50)]
    if reason:
        assert reason in found and t == 1 and np.argmin(losses) in (0, 49)
    else:
        assert found is None and t != 1 and 0 < np.argmin(losses) < 49


def test_one_error_in_a_hundred_or_logits_a_little_better_than_chance_are_enough_for_a_temperature():
    one_error = 3 * F.one_hot(torch.arange(100) % 2, 2).double()
    labels = torch.arange(100) % 2
    labels[0] = 1
    nearly = torch.tensor([[1.0, 0.0]] * 1000).double()  # 502 right, 498 wrong: 0.4 % of the logits' mean
    for logits, y in ((one_error, labels), (nearly, (torch.arange(1000) >= 502).long())):
        assert why_no_temperature(logits, y) is None and fit_temperature(logits, y) != 1


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_whether_a_temperature_is_best_does_not_depend_on_the_scale_of_the_logits(scale):
    logits = scale * torch.tensor([[2, 0, 0], [0, 1, 0]]).double()
    assert why_no_temperature(logits, torch.tensor([0, 0])) is None
    assert "every validation sample is right" in why_no_temperature(logits, torch.tensor([0, 1]))
    assert "no better than chance" in why_no_temperature(logits, torch.tensor([1, 2]))


def test_exactly_at_chance_rounding_decides_nothing():
    """Each text once with every label: the labels' logits are the mean, up to rounding, also of float32 logits."""
    for seed in range(20):
        logits = torch.randn(30, 3, generator=torch.Generator().manual_seed(seed)).repeat_interleave(3, 0)
        labels = torch.arange(3).repeat(30)
        assert "no better than chance" in why_no_temperature(logits, labels) and fit_temperature(logits, labels) == 1


def test_no_temperature_is_best_exactly_where_the_loss_has_no_minimum():
    """Convex in 1 / T, it has one iff it falls at 1 / T = 0 and rises far out: differences of losses say."""
    generator, reasons = torch.Generator().manual_seed(0), []
    for _ in range(300):
        logits = torch.randint(-3, 4, (3, 3), generator=generator).double()
        labels = torch.randint(3, (3,), generator=generator)
        losses = [float(F.cross_entropy(x * logits, labels)) for x in (0, 1e-5, 30, 31)]  # x is 1 / T
        has_one = losses[1] < losses[0] and losses[3] > losses[2]
        reasons.append(why_no_temperature(logits, labels))
        assert (reasons[-1] is None) == has_one, (logits, labels)
    assert min(reasons.count(reason) for reason in set(reasons)) > 10 and len(set(reasons)) == 3


def test_without_numbers_there_is_no_temperature():
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="NaN"):
            fit_temperature(torch.tensor([[bad, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))


def test_dividing_logits_by_t_is_dividing_v_and_b_by_t(model, small_task):
    """Sec. 4.6, and therefore no prediction changes."""
    features, logits = predict(model, small_task.splits["val"])
    with torch.no_grad():
        model.head.weight /= 2.5
        model.head.bias /= 2.5
    _, scaled = predict(model, small_task.splits["val"])
    assert torch.allclose(scaled, logits / 2.5, atol=1e-6)
    assert torch.equal(scaled.argmax(1), logits.argmax(1))


def test_calibration_error_by_hand():
    """Bins are (0, 1/2] and (1/2, 1]: confidence .5 belongs to the lower one."""
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0], [0.6, 0.2, 0.2]]).double()
    ece, mce = calibration_error(probs.log(), torch.tensor([0, 0, 1]), bins=2)
    lower, upper = abs(1 - 0.5), abs(1 / 2 - (0.9 + 0.6) / 2)
    assert ece == pytest.approx((1 * lower + 2 * upper) / 3)
    assert mce == pytest.approx(max(lower, upper))


def logits_of(*probabilities):
    """Logits whose softmax is exactly these multiples of powers of two, 0 included."""
    return torch.tensor(probabilities, dtype=torch.double).log().clamp(min=-1e4)


def test_bins_are_open_below_and_closed_above_at_confidences_that_floats_hold_exactly():
    """4 bins: 1/4 is in (0, 1/4], 1/2 is in (1/4, 1/2] beside 3/8, and 1 is in (3/4, 1]."""
    logits = logits_of([0.25, 0.25, 0.25, 0.25], [0.375, 0.25, 0.25, 0.125], [0.5, 0.5, 0, 0],
                       [0.75, 0.25, 0, 0], [1, 0, 0, 0])
    confidence = logits.softmax(1).amax(1)
    assert confidence[[0, 2, 4]].tolist() == [0.25, 0.5, 1]
    labels = torch.tensor([0, 0, 2, 0, 1])  # right, right, wrong, right, wrong
    gaps = [1 - 0.25, 2 * (1 / 2 - (0.375 + 0.5) / 2), 1 - 0.75, 1 - 0]  # times samples, bin by bin
    ece, mce = calibration_error(logits, labels, bins=4)
    assert ece == pytest.approx(sum(gaps) / 5, abs=1e-12) and mce == pytest.approx(1, abs=1e-12)


def test_the_bins_edge_at_one_half_alone_decides():
    """With 1/2 in the bin above, 3/8 and 5/8 would each change partners, and ECE and MCE with them."""
    logits = logits_of([0.375, 0.375, 0.25], [0.5, 0.5, 0], [0.625, 0.375, 0])
    labels = torch.tensor([0, 2, 0])  # right, wrong, right
    lower, upper = 1 / 2 - (0.375 + 0.5) / 2, 1 - 0.625
    expected = (2 * lower + upper) / 3, upper
    assert calibration_error(logits, labels, bins=4) == pytest.approx(expected, abs=1e-12)


def test_mce_is_the_largest_gap_of_a_bin_however_few_samples_are_in_it():
    """Of four samples of confidence 3/4 three are right, which is no gap; one of confidence 1/2 is wrong."""
    logits = logits_of(*[[0.75, 0.25]] * 4, [0.5, 0.5])
    labels = torch.tensor([0, 0, 0, 1, 1])
    assert calibration_error(logits, labels, bins=4) == pytest.approx((0.5 / 5, 0.5), abs=1e-12)


def test_an_over_confident_and_an_under_confident_bin_do_not_cancel():
    """ECE is a sum of absolute gaps: 1/4 too sure and 1/4 not sure enough are 1/4, not 0."""
    logits = logits_of([0.75, 0.25], [0.75, 0.25], [1, 0], [1, 0], [1, 0], [1, 0])
    labels = torch.tensor([0, 0, 0, 0, 0, 1])
    assert calibration_error(logits, labels, bins=4) == pytest.approx((0.25, 0.25), abs=1e-12)


def test_calibration_error_of_every_sample_on_its_own():
    """With a loop over 15 bins instead of bincount."""
    logits, labels = calibrated_logits(2000)
    probs = (3 * logits).softmax(1)
    confidence, prediction = probs.max(1)
    gaps, sizes = [], []
    for m in range(1, 16):
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            gaps.append(abs(float((prediction == labels)[inside].double().mean() - confidence[inside].mean())))
            sizes.append(int(inside.sum()))
    ece, mce = calibration_error(3 * logits, labels)
    assert ece == pytest.approx(np.dot(gaps, sizes) / 2000) and mce == pytest.approx(max(gaps))


# ------------------------------------------------------------------------------------ features


def test_feature_statistics_against_their_definitions():
    generator = torch.Generator().manual_seed(0)
    x, x_0 = torch.randn(2, 30, 5, generator=generator, dtype=torch.double)
    y = torch.arange(30) % 3
    found = feature_statistics(x, x_0, y)
    cosines = pytest.importorskip("sklearn.metrics").pairwise.cosine_similarity(x.numpy())
    assert found["cs"] == pytest.approx(cosines[~np.eye(30, dtype=bool)].mean())
    assert found["diff"] == pytest.approx(float((x - x_0).norm(dim=1).mean()))
    assert found["norm"] == pytest.approx(float(x.norm(dim=1).mean()))
    within = sum(np.cov(x[y == c].T, bias=True) * 10 for c in range(3))
    total = np.cov(x.T, bias=True) * 30  # S_total = S_between + S_within
    assert found["fdr"] == pytest.approx(np.trace(total - within) / np.trace(within))


def test_fdr_weighs_the_classes_by_their_samples():
    """Class 0 at 0, 1, 2 and class 1 at 5, mean 2: between 3 x 1 + 1 x 9, within 1 + 0 + 1 + 0."""
    x = torch.tensor([[0.0], [1.0], [2.0], [5.0]])
    assert feature_statistics(x, x, torch.tensor([0, 0, 0, 1]))["fdr"] == 12 / 2
    assert feature_statistics(x, x, torch.tensor([2, 2, 2, 0]))["fdr"] == 12 / 2  # class 1 has no sample


def test_cs_diff_and_norm_by_hand():
    """(3, 4), (4, 3) and (0, 1): cosines 24/25, 4/5, 3/5 of pairs; ways of 5, 0 and 2; lengths 5, 5, 1."""
    x, x_0 = torch.tensor([[3.0, 4], [4, 3], [0, 1]]), torch.tensor([[0.0, 0], [4, 3], [0, 3]])
    found = feature_statistics(x, x_0, torch.tensor([0, 1, 1]))
    assert found["cs"] == pytest.approx((24 / 25 + 4 / 5 + 3 / 5) / 3)
    assert found["diff"] == pytest.approx(7 / 3) and found["norm"] == pytest.approx(11 / 3)


def test_one_sample_or_no_spread_within_classes_has_no_cs_or_no_finite_fdr():
    one = torch.tensor([[1.0, 2.0]])
    assert math.isnan(feature_statistics(one, one, torch.tensor([0]))["cs"])
    assert math.isinf(feature_statistics(torch.eye(2), torch.eye(2), torch.tensor([0, 1]))["fdr"])


# ------------------------------------------------------------------------------------ CUDA


def test_cudnn_attention_is_off():
    """On an H100 LoRA ended in NaN at rates where it merely fails to learn elsewhere (next test)."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.cuda
def test_gradients_of_attention_are_finite_where_every_logit_is_low():
    """64 tokens, logits of -120: exp(-120) is 0 in float32, and softmax is what it was without the -120."""
    q, k, v = (torch.randn(1, 1, 64, 64, device="cuda", dtype=torch.bfloat16) * 0.1 for _ in range(3))
    q[..., 0], k[..., 0] = 1.0, -120 * 64**0.5
    q.requires_grad_()
    mask = torch.ones(1, 1, 1, 64, dtype=torch.bool, device="cuda")
    F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.cuda
def test_features_on_cuda_are_those_of_the_cpu(model, small_task):
    on_cpu, _ = predict(model, small_task.splits["val"])
    on_cuda, _ = predict(model.cuda(), small_task.splits["val"])
    assert (on_cuda - on_cpu).norm() < 1e-4 * on_cpu.norm()


@pytest.mark.cuda
def test_lp_from_features_on_cuda_is_lp_from_the_same_on_the_cpu():
    x, y = samples(150, 20, 3)
    on_cpu, on_cuda = fit_linear_probe(x, y, 3), fit_linear_probe(x.cuda(), y.cuda(), 3)
    assert on_cuda.inverse_l2 == on_cpu.inverse_l2
    assert (on_cuda.weight - on_cpu.weight).norm() < 1e-6 * on_cpu.weight.norm()


@pytest.mark.cuda
@pytest.mark.parametrize("lora", [False, True])
def test_a_step_on_cuda_waits_for_nothing(model, small_task, lora):
    """PyTorch warns where the host waits for the GPU: once an epoch, to read loss and accuracy."""
    if lora:
        add_lora(model.encoder, r=4, lora_alpha=12)
    model, train = model.cuda(), small_task.splits["train"]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    train_epoch(model, train, [range(8)], optimizer, schedule)  # whatever is set up once
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            train_epoch(model, train, [range(8, 16), range(16, 24), range(24, 32)], optimizer, schedule)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchron" in str(wait.message) for wait in waits) == 1
