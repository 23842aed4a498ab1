"""Training is what paper.md Sec. 2 says: dropout, clipping, decay, order, best epoch, and how LoRA starts."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import lpft
import train as command
from conftest import tiny_config
from data import Split, Task, draw_ntk_samples, load_task, tiny, training_batches
from plumbing.export import lora_settings
from lpft import fine_tune, predict
from model import Classifier, Encoder, LoRALinear, add_lora
from plumbing.checkpoint import load_pretrained
from train import parse_args


@pytest.fixture(scope="module")
def small_task():
    return load_task("tiny-120", tiny.make_tokenizer(), max_train=60, max_test=0)


@pytest.fixture
def model(random_folder):
    encoder, _ = load_pretrained(random_folder)
    torch.manual_seed(0)
    return Classifier(encoder, 3)


def train(model, task, **how):
    how = {"lr": 1e-3, "batch_size": 8, "epochs": 2} | how
    return fine_tune(model, task.splits["train"], task.splits["val"], **how)


# ------------------------------------------------------------------------------------ dropout


def no_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):  # attention's
            module.dropout = 0.0


def silence(linear):
    """Its output is 0, of which dropout leaves 0: what is left is dropout elsewhere."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def only_embeddings(model):
    model.encoder.dropout.p = 0.5


def only_attention_probabilities(model):
    model.encoder.layers[1].attention.dropout = 0.5


def only_what_attention_says(model):
    silence(model.encoder.layers[1].ffn_out)
    model.encoder.layers[1].dropout.p = 0.5


def only_what_the_ffn_says(model):
    silence(model.encoder.layers[1].attention.output)
    model.encoder.layers[1].dropout.p = 0.5


def only_before_the_head(model):
    model.dropout.p = 0.5


DROPOUT = (only_embeddings, only_attention_probabilities, only_what_attention_says, only_what_the_ffn_says,
           only_before_the_head)


@pytest.mark.parametrize("site", DROPOUT, ids=[site.__name__ for site in DROPOUT])
def test_each_dropout_alone_changes_the_training_loss_and_no_evaluation(model, batch, site):
    no_dropout(model)
    site(model)
    labels, losses = torch.tensor([0, 1, 2]), {}
    for training in (True, False):
        model.train(training)
        losses[training] = {F.cross_entropy(model(**batch), labels).item() for _ in range(3)}
    assert len(losses[True]) == 3 and len(losses[False]) == 1


def test_every_dropout_has_the_rate_of_the_configuration(batch, monkeypatch):
    """Embeddings, two per layer, head: hidden_dropout_prob. Attention: attention_probs_dropout_prob."""
    config = replace(tiny_config(), hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    model, hidden, attention = Classifier(Encoder(config), 3), [], []
    drop, attend = F.dropout, F.scaled_dot_product_attention

    def seen_drop(x, p=0.5, training=True, inplace=False):
        hidden.append(p if training else 0.0)
        return drop(x, p, training, inplace)

    def seen_attend(*inputs, dropout_p=0.0, **more):
        attention.append(dropout_p)
        return attend(*inputs, dropout_p=dropout_p, **more)

    monkeypatch.setattr(F, "dropout", seen_drop)
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen_attend)
    for training in (True, False):
        model.train(training)(**batch)
    assert hidden == [0.3] * 6 + [0.0] * 6 and attention == [0.2] * 2 + [0.0] * 2


def test_a_pretrained_encoder_is_fine_tuned_with_dropout_of_one_tenth(model):
    """Which is what the checkpoints' config.json says, and the default where it says nothing."""
    assert model.dropout.p == model.encoder.dropout.p == model.encoder.layers[0].dropout.p == 0.1
    assert model.encoder.layers[0].attention.dropout == 0.1


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_ft_stage_trains_in_train_mode_and_measures_in_eval_mode(model, small_task, lora):
    """Every module in every epoch, also after validation; the model it leaves is in eval mode."""
    if lora:
        add_lora(model.encoder, r=4, lora_alpha=12)
    seen = {True: set(), False: set()}  # whether gradients are on: {modules' modes}

    def look(*_):
        seen[torch.is_grad_enabled()].add(tuple({module.training for module in model.modules()}))

    model.encoder.word_embeddings.register_forward_hook(look)
    train(model, small_task)
    assert seen == {True: {(True,)}, False: {(False,)}}
    assert not any(module.training for module in model.modules())


def test_the_training_loss_of_an_epoch_has_dropout_in_it_and_that_of_the_start_has_none(model, small_task):
    """At a learning rate of nothing epoch 0 has the loss without dropout, epoch 1 another one, by seed."""
    split = small_task.splits["train"]
    without = float(F.cross_entropy(predict(model, split)[1], split.labels))
    losses = []
    for torch_seed in (1, 1, 2):
        torch.manual_seed(torch_seed)
        history = train(copy.deepcopy(model), small_task, lr=1e-12, epochs=1)
        losses.append([record["loss"] for record in history])
    assert all(loss[0] == pytest.approx(without, rel=1e-6) for loss in losses)
    assert losses[0][1] == losses[1][1] != losses[2][1]
    assert losses[0][1] != pytest.approx(without, rel=1e-4)
    no_dropout(model)
    assert train(model, small_task, lr=1e-12, epochs=1)[1]["loss"] == pytest.approx(without, rel=1e-5)


def test_lp_reads_features_without_dropout(model, small_task):
    """phi_0 is fixed: measured in train or in eval mode it is the same, and the mode is left as it was."""
    split = small_task.splits["val"]
    found = [predict(model.train(mode), split)[0] for mode in (True, False, True)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and model.training


# ------------------------------------------------------------------------------------ the steps


@pytest.fixture
def steps(monkeypatch):
    """What every step of the optimizer sees: its learning rate, settings and the norm of its gradient."""
    seen, step = [], torch.optim.AdamW.step

    def record(optimizer, *args, **kwargs):
        group, = optimizer.param_groups
        grads = [p.grad for p in group["params"] if p.grad is not None]
        seen.append({"lr": group["lr"], "weight_decay": group["weight_decay"], "betas": group["betas"],
                     "norm": math.sqrt(sum(float(g.double().square().sum()) for g in grads)),
                     "parameters": {id(p) for p in group["params"]}})
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    return seen


def test_the_gradient_is_clipped_to_norm_one_and_a_shorter_one_is_left_alone(model, small_task, steps):
    """A head 300 times as large makes it long; a head of nearly nothing leaves that of V and b alone."""
    no_dropout(model)
    split, small = small_task.splits["train"], copy.deepcopy(model)
    with torch.no_grad():
        model.head.weight *= 300
        small.head.weight *= 1e-3
    train(model, small_task, epochs=1)
    assert max(step["norm"] for step in steps) == pytest.approx(1, rel=1e-4)
    batch, labels = split.batch(range(60))
    with torch.no_grad():
        errors = small(**batch).softmax(1) - F.one_hot(labels, 3)  # (N, C)
        of_weight, of_bias = errors.T @ small.features(**batch) / 60, errors.mean(0)  # (C, h), (C,)
    short = math.hypot(float(of_weight.norm()), float(of_bias.norm()))
    steps.clear()
    train(small, small_task, epochs=1, batch_size=60)
    assert [step["norm"] for step in steps] == [pytest.approx(short, rel=1e-3)] and 0.01 < short < 0.99


def test_the_learning_rate_falls_linearly_at_every_step_without_warm_up(model, small_task, steps):
    """lr (1 - k / steps) at step k = 0, 1, ...: the first has all of it, after the last there is none."""
    history = train(model, small_task, lr=4e-3, batch_size=16, epochs=3)
    assert [step["lr"] for step in steps] == pytest.approx([4e-3 * (1 - k / 12) for k in range(12)])
    assert [record["lr"] for record in history] == pytest.approx([4e-3 * (1 - k / 12) for k in (0, 4, 8, 12)])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_optimizer_is_adam_without_weight_decay_on_all_that_trains(model, small_task, steps, lora):
    if lora:
        add_lora(model.encoder, r=4, lora_alpha=12)
    trained = {id(p) for name, p in model.named_parameters()
               if not lora or "lora_" in name or name.startswith("head.")}
    train(model, small_task, epochs=1)
    for step in steps:
        assert step["weight_decay"] == 0 and step["betas"] == (0.9, 0.999) and step["parameters"] == trained


def test_the_order_of_the_samples_is_by_seed_and_another_in_every_epoch(model, small_task, monkeypatch):
    """Whatever PyTorch's global generator says, from which dropout draws; every sample once an epoch."""
    seen, train_epoch = [], lpft.train_epoch

    def record(model, split, batches, *more):
        seen.append([list(map(int, batch)) for batch in batches])
        return train_epoch(model, split, batches, *more)

    monkeypatch.setattr(lpft, "train_epoch", record)
    for seed, torch_seed in ((7, 1), (7, 2), (8, 1)):
        torch.manual_seed(torch_seed)
        train(copy.deepcopy(model), small_task, seed=seed)
    first, second, same_first, same_second, *other = seen
    assert first != second and (first, second) == (same_first, same_second)
    assert first not in other and second not in other
    assert all(sorted(sum(batches, [])) == list(range(60)) for batches in seen)
    lengths = small_task.splits["train"].lengths
    expected = training_batches(lengths, 8, torch.Generator().manual_seed(7001))
    assert first == [batch.tolist() for batch in expected]  # a saved state goes on in this order


def test_the_epoch_loss_and_accuracy_are_means_over_samples_not_over_batches(model, small_task):
    """60 samples in batches of 32 and 28: at a learning rate of nothing that is the loss of the model."""
    no_dropout(model)
    split = small_task.splits["train"]
    logits = predict(model, split)[1]
    first = train(model, small_task, lr=1e-12, batch_size=32, epochs=1)[1]
    assert first["loss"] == pytest.approx(float(F.cross_entropy(logits, split.labels)), rel=1e-5)
    assert first["train_accuracy"] == pytest.approx(float((logits.argmax(1) == split.labels).double().mean()))


# ------------------------------------------------------------------------------------ the best epoch


@pytest.mark.parametrize("scores, kept", [([0.9, 0.1, 0.5, 0.5, 0.2], 2), ([0.0, 0.3, 0.2, 0.1, 0.0], 1),
                                          ([0.5, -0.1, -0.2, -0.3, -0.01], 4)],
                         ids=["the-first-of-two", "not-the-last", "not-the-start"])
def test_the_first_epoch_with_the_best_score_is_kept(model, small_task, monkeypatch, scores, kept):
    """By the metric that was asked for, whatever the accuracy; never epoch 0, which is the start."""
    told = iter(scores)
    monkeypatch.setitem(lpft.METRICS, "matthews", lambda logits, labels: next(told))
    heads = []
    history = train(model, small_task, epochs=4, batch_size=32, metric="matthews",
                    on_epoch=lambda record: heads.append(model.head.weight.detach().clone()))
    assert [record["val_matthews"] for record in history] == scores
    assert [torch.equal(model.head.weight, head) for head in heads].index(True) == kept


def test_an_epoch_is_scored_on_validation_and_not_on_training_samples(model, small_task):
    record = train(model, small_task, lr=5e-3, epochs=1)[-1]
    for name, of_validation in (("val", True), ("train", False)):
        split = small_task.splits[name]
        score = float((predict(model, split)[1].argmax(1) == split.labels).double().mean())
        assert (record["val_accuracy"] == pytest.approx(score)) == of_validation


# ------------------------------------------------------------------------------------ settings

AUTHORS = """ boolq     32 1e-5  32 5e-4  8 1e-5  8 5e-4
              cb        16 5e-5  16 1e-3  8 5e-6  8 1e-4
              rte       16 1e-5  16 1e-3  8 1e-5  8 5e-4
              wic       32 1e-5  16 1e-3  8 1e-5  8 1e-3
              wsc       16 1e-3  16 1e-4  8 1e-3  8 1e-4
              cola      32 5e-5  16 1e-3  8 1e-5  8 1e-3
              mrpc      16 1e-5  32 1e-5  8 1e-5  8 1e-3
              sst2      32 1e-5  32 5e-4  8 1e-5  8 1e-3
              amazon    16 1e-5  16 1e-3  8 1e-6  8 5e-4
              pubmed20k  8 5e-6   8 5e-4  8 5e-6  8 1e-3"""


@pytest.mark.parametrize("row", AUTHORS.split("\n"), ids=lambda row: row.split()[0])
def test_batch_size_and_learning_rate_are_those_of_the_authors_for_roberta(row):
    """For FT, LoRA, LP-FT and LP-LoRA, where nothing else is asked for."""
    name, *numbers = row.split()
    stages = (["ft"], ["ft", "--lora"], ["lpft"], ["lpft", "--lora"])
    for stage, batch_size, lr in zip(stages, numbers[::2], numbers[1::2], strict=True):
        args = parse_args(["--model", "roberta-base", "--data", name, "--method", *stage])
        assert (args.batch_size, args.lr) == (int(batch_size), float(lr))


def test_defaults_are_those_of_the_paper():
    """10 epochs, 128 tokens, r = alpha = 8, LP by cross-validated accuracy, 250 samples of the kernel."""
    args = parse_args(["--model", "roberta-base", "--data", "cb", "--method", "lpft", "--lora", "--ntk"])
    assert (args.epochs, args.max_length, args.lora_r, args.lora_alpha, args.ntk) == (10, 128, 8, 8, 250)
    assert (args.lp_scoring, args.lp_inverse_l2, args.head_scale) == ("accuracy", None, None)


def test_r_and_alpha_of_the_command_line_are_each_their_own():
    args = parse_args(["--lora", "--lora-r", "4", "--lora-alpha", "12"])
    assert (args.lora_r, args.lora_alpha) == (4, 12)
    args = parse_args(["--lora", "--lora-r", "4"])
    assert (args.lora_r, args.lora_alpha) == (4, 8)


def test_the_ft_stage_gets_its_splits_and_the_flags_of_the_command(random_folder, tmp_path, monkeypatch):
    """The seed, too, which decides the order of the samples, and nothing else shows."""
    handed = {}

    def look(model, train, val, **how):
        handed.update(how, sizes=(len(train), len(val)))
        raise ValueError("seen enough")

    monkeypatch.setattr(command, "fine_tune", look)
    flags = "--method ft --max-train 60 --max-test 0 --seed 5 --lr 0.003 --batch-size 24 --epochs 3".split()
    assert command.main(["--model", str(random_folder), "--out", str(tmp_path / "run"), *flags]) == 2
    assert handed["sizes"] == (60, 200) and handed["metric"] == "accuracy"
    assert [handed[name] for name in ("seed", "lr", "batch_size", "epochs")] == [5, 0.003, 24, 3]


def test_samples_of_the_kernel_are_by_seed_of_train_and_of_test_or_else_of_val():
    splits = {name: Split([([5], [0], i % 2) for i in range(size)], 0)
              for name, size in (("train", 200), ("val", 90), ("test", 100))}
    task = Task(splits, ["no", "yes"])
    first, again, other = (draw_ntk_samples(50, seed, task) for seed in (1, 1, 2))
    assert list(first) == ["train", "test"]
    for split in first:
        assert (first[split] == again[split]).all() and (first[split] != other[split]).any()
        assert len({*first[split].tolist()}) == 50 and max(first[split]) < len(splits[split])
        assert list(first[split]) != sorted(first[split])  # kernel regression deals its folds in this order
    del splits["test"]
    assert list(draw_ntk_samples(50, 1, task)) == ["train", "val"]
    assert len(draw_ntk_samples(250, 1, task)["val"]) == 90  # all there are


# ------------------------------------------------------------------------------------ LoRA


def test_lora_a_is_drawn_between_plus_and_minus_one_over_the_root_of_its_width():
    """Kaiming-uniform with a = sqrt(5), as nn.Linear: variance 1 / (3 in); B is 0."""
    for width in (64, 200):
        torch.manual_seed(0)
        lora = LoRALinear(nn.Linear(width, 48), r=100, lora_alpha=7)
        bound, A = width**-0.5, lora.lora_A.weight.detach()
        assert A.shape == (100, width) and 0.99 * bound < float(A.abs().max()) <= bound
        assert float(A.var()) == pytest.approx(bound**2 / 3, rel=0.05) and abs(float(A.mean())) < 0.02 * bound
        assert not lora.lora_B.weight.any() and lora.lora_B.weight.shape == (48, 100)


def test_lora_a_has_the_distribution_of_pefts():
    """peft is the reference implementation: the same nine deciles."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(64, 64))
    theirs = peft.get_peft_model(holder, peft.LoraConfig(r=200, lora_alpha=7, target_modules=["0"]))
    their_A = theirs.base_model.model[0].lora_A["default"].weight.detach()
    our_A = LoRALinear(nn.Linear(64, 64), r=200, lora_alpha=7).lora_A.weight.detach()
    deciles = torch.linspace(0.1, 0.9, 9)
    assert torch.allclose(our_A.quantile(deciles), their_A.quantile(deciles), atol=0.005)
    assert our_A.shape == their_A.shape


def test_a_lora_layer_adds_alpha_over_r_times_b_a_x():
    """W_0 x + b_0 + (alpha / r) B A x, unmerged and merged, with alpha = 12 and r = 4."""
    torch.manual_seed(0)
    linear, x = nn.Linear(20, 10).double(), torch.randn(5, 20, dtype=torch.double)
    lora = LoRALinear(copy.deepcopy(linear), r=4, lora_alpha=12)
    nn.init.normal_(lora.lora_B.weight)
    expected = linear(x) + 3 * x @ lora.lora_A.weight.T @ lora.lora_B.weight.T
    assert torch.allclose(lora(x), expected) and torch.allclose(lora.merged()(x), expected)


@pytest.mark.parametrize("r, lora_alpha", [(4, 12), (8, 2), (3, 1)])
def test_lora_settings_are_r_and_alpha_and_not_r_twice(encoder, r, lora_alpha):
    add_lora(encoder, r, lora_alpha)
    assert lora_settings(encoder) == (r, pytest.approx(lora_alpha))


def test_lora_by_default_has_rank_and_alpha_eight(encoder):
    add_lora(encoder)
    assert lora_settings(encoder) == (8, 8)
