"""From the probe's head into fine-tuning: the head, an epoch of training, the epoch that is kept (Sec. 5)."""

import copy
import math

import torch

from assignments.graders import Wrong, close, expect, points, require
from data import Split
from model import Classifier, Encoder, EncoderConfig

NO_BIAS = "copying V and leaving b as it was"
NEW_HEAD = "putting a new layer in place of the head: an optimizer that has the old one trains nothing"
OLD_HEAD = "leaving the head as it was: FT would start from a random one"
WITH_START = "counting epoch 0, which is the start"
LAST_OF_EQUALS = "keeping the last of equal epochs, not the first"
LAST = "keeping the last epoch"
LOWEST_LOSS = "keeping the epoch with the lowest loss"
FROM_ZERO = "starting from a best score of 0: a correlation can be 0 or below in all epochs"
FALSY = "taking a best score of 0 for none, as `if not best` does; compare with None"
ACCURACY = "always comparing accuracy, where `metric` names another score"
SUM = "taking the gradient of the sum over the batch, not of the mean"
KEPT = "keeping old gradients: they add up from step to step"
NO_CLIP = "not clipping the gradient"
CLIP_EACH = "clipping each parameter on its own, not all of them together"
CLIP_VALUES = "clipping every entry to 1, not the norm"
NORMALISED = "dividing by the norm also where it is below 1"
PER_EPOCH = "stepping the schedule once an epoch, or never, and not after every batch"
TOO_SOON = "stepping the schedule before the optimizer"
EVAL = "training in eval mode, so without dropout"
BATCH_MEANS = "averaging over batches, not over samples: a small last batch counts too much"
SUMMED = "adding up without dividing by the number of samples"
AFTER = "measuring after the training, not during it"
THAWED = "taking gradients of frozen parameters, too: they count in the norm"
FINITE = "looking at the loss alone: it can be finite where the gradient is not"
CALLED = "train_epoch(model, split of 9 texts, batches of 4, 3 and 2, SGD, schedule)"
BATCHES = 4, 3, 2


def texts(rng, classes=3):
    """A Split of 9 texts of 3 to 7 tokens."""
    def draw(low, high):
        return int(torch.randint(low, high, (), generator=rng))

    lengths = [draw(3, 8) for _ in range(sum(BATCHES))]
    labels = [i % classes for i in torch.randperm(len(lengths), generator=rng).tolist()]
    examples = [([draw(1, 12) for _ in range(n)], [0] * n, y) for n, y in zip(lengths, labels)]
    return Split(examples, pad_token_id=0)


def classifier(rng, dropout=0.0, steep=False, classes=3):
    """A random two-layer Classifier in float64; where it is steep, gradients are mostly longer than 1."""
    config = EncoderConfig(vocab_size=12, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=16, max_position_embeddings=8, hidden_dropout_prob=dropout,
                           attention_probs_dropout_prob=dropout)
    model = Classifier(Encoder(config), classes).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=rng, dtype=torch.double)
            p.copy_(1 + 0.1 * noise if "norm.weight" in name else 0.2 * noise)
        if not steep:  # phi is short, and V small
            model.encoder.layers[-1].ffn_norm.weight *= 0.1
            model.encoder.layers[-1].ffn_norm.bias *= 0.1
        model.head.weight *= 20 if steep else 0.2
    return model


def deal(rng):
    """Index arrays of 4, 3 and 2 samples, every one once, in random order."""
    return [part.numpy() for part in torch.randperm(sum(BATCHES), generator=rng).split(BATCHES)]


def norm_of(gradients):
    return torch.cat([g.flatten() for g in gradients]).norm()


def together(gradients):
    norm = norm_of(gradients)
    return [g / norm.clamp(min=1) for g in gradients]


CLIPS = {NO_CLIP: lambda gradients: gradients,
         CLIP_EACH: lambda gradients: [g / g.norm().clamp(min=1) for g in gradients],
         CLIP_VALUES: lambda gradients: [g.clamp(-1, 1) for g in gradients],
         NORMALISED: lambda gradients: [g / norm_of(gradients) for g in gradients]}


def by_hand(model, split, batches, rates, clip=together, train=True, total=False, keep=False):
    """(change of all parameters (p,), losses (N,), right (N,)) of gradient descent on a copy of the model.

    rates: the step size of each batch. losses and right are those of each sample before its step.
    """
    model = copy.deepcopy(model).train(train)
    start, trained = flat(model), [p for p in model.parameters() if p.requires_grad]
    losses, right, old = [], [], [torch.zeros_like(p) for p in trained]
    for indices, rate in zip(batches, rates):
        batch, labels = split.batch(indices)
        log_probs = model(**batch).log_softmax(1)  # (n, C)
        loss = -log_probs.gather(1, labels[:, None])[:, 0]  # (n,)
        gradients = torch.autograd.grad(loss.sum() if total else loss.mean(), trained)
        old = clip([g + o for g, o in zip(gradients, old)] if keep else gradients)
        with torch.no_grad():
            for p, g in zip(trained, old):
                p -= rate * g
        losses.append(loss.detach())
        right.append((log_probs.argmax(1) == labels).double())
    return flat(model) - start, torch.cat(losses), torch.cat(right)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def change(student, model, split, batches, rate=0.1, decay=1.0, prepare=lambda model: None):
    """(change of all parameters (p,), loss, accuracy) of the student's epoch with SGD, on a copy."""
    model = copy.deepcopy(model)
    prepare(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay**step)
    start = flat(model)
    result = student.train_epoch(model, split, batches, optimizer, schedule)
    require(isinstance(result, tuple) and len(result) == 2, CALLED, "(mean loss, accuracy)", result)
    return flat(model) - start, *map(float, result)


def rates_of(rate=0.1, decay=1.0):
    return [rate * decay**step for step in range(len(BATCHES))]


# ---------------------------------------------------------------------------- the head and the best epoch


@points(1)
def the_head_is_the_probes(student, rng):
    "V and b of the probe become those of model.head, in place: the same parameters, with other numbers"
    model = classifier(rng).float()
    weight, bias = (torch.randn(*shape, generator=rng, dtype=torch.double) for shape in ((3, 8), (3,)))
    before, head = flat(model.head), (model.head.weight, model.head.bias)
    student.set_head(model, student.LinearProbe(weight, bias, 1.0, None, []))
    found = torch.cat([model.head.weight.detach().flatten(), model.head.bias.detach().flatten()])  # (27,)
    called = "set_head(model, probe), V (3, 8), b (3,), float64; the head is float32"
    expect(found, torch.cat([weight.flatten(), bias]), f"head's V and b after {called}",
           {NO_BIAS: torch.cat([weight.flatten(), before[-3:]]), OLD_HEAD: before})
    same = all(new is old for new, old in zip((model.head.weight, model.head.bias), head))
    require(same, f"the head's parameters after {called}", "the same ones, with other numbers", NEW_HEAD)
    require(found.dtype == torch.float32 and all(p.requires_grad for p in head),
            f"the head's parameters after {called}", "float32, and they require gradients",
            f"{found.dtype}, requires_grad {[p.requires_grad for p in head]}")


def falsy(history, name):
    """The epoch that is kept where a best score of 0 counts as none yet."""
    best, kept_epoch = None, None
    for record in history[1:]:
        if not best or record[name] > best:
            best, kept_epoch = record[name], record["epoch"]
    return kept_epoch


def history_of(rng, epochs=8):
    """Dicts as fine_tune's: accuracy, correlation and loss are best in three different epochs."""
    draws = torch.rand(3, epochs + 1, generator=rng, dtype=torch.double)
    first, second, third = (torch.randperm(epochs - 1, generator=rng)[:3] + 1).tolist()  # not the last
    draws[0, first], draws[1, second], draws[2, third] = 2.0, 2.0, -1.0
    names = "val_accuracy", "val_matthews", "loss"
    return [{"epoch": i} | dict(zip(names, column)) for i, column in enumerate(draws.T.tolist())]


def kept(student, history, metric, expected, misconceptions):
    found = student.best_epoch(history, metric)
    called = f"best_epoch(history of {len(history)} dicts, {metric!r})"
    below = all(record[f"val_{metric}"] <= 0 for record in history[1:])
    require(isinstance(found, dict) and "epoch" in found, called, f"the dict of epoch {expected}", found,
            FROM_ZERO if found is None and below else None)
    expect(found["epoch"], expected, f'{called}["epoch"]', misconceptions, 1e-9)


@points(1)
def the_best_epoch_has_the_highest_validation_score(student, rng):
    'The highest record["val_METRIC"] of the history; result: the whole record, a dict'
    for metric, lower in (("matthews", 0.0), ("accuracy", 0.0), ("matthews", 2.0)):
        history = history_of(rng)
        for record in history:
            record["val_matthews"] -= lower  # by 2, and the best is 0
        expected, accuracy = (max(history, key=lambda record: record[name])["epoch"]
                              for name in (f"val_{metric}", "val_accuracy"))
        lowest = min(history, key=lambda record: record["loss"])["epoch"]
        kept(student, history, metric, expected,
             ({FALSY: falsy(history, f"val_{metric}"), FROM_ZERO: 0} if lower else {})
             | {ACCURACY: accuracy, LAST: len(history) - 1, LOWEST_LOSS: lowest})


@points(1)
def the_start_does_not_count_and_the_first_of_equals_does(student, rng):
    "Of epochs 1, 2, ... the first with the highest score; epoch 0, the start, is measured and never kept"
    for best in (1, 3):
        history = history_of(rng)
        later = int(torch.randint(best + 1, len(history), (), generator=rng))
        for epoch, value in ((0, 4.0), (best, 3.0), (later, 3.0)):
            history[epoch]["val_accuracy"] = value
        kept(student, history, "accuracy", best,
             {WITH_START: 0, LAST_OF_EQUALS: later, LAST: len(history) - 1})


# ---------------------------------------------------------------------------- an epoch


def compare(student, model, split, batches, misconceptions, rate=0.1, decay=1.0):
    """The student's change of the parameters against that of the loop above."""
    expected, _, _ = by_hand(model, split, batches, rates_of(rate, decay))
    found, *_ = change(student, model, split, batches, rate, decay)
    moved = f"change of all {len(found)} parameters, in the order of model.parameters(), by {CALLED}"
    if not close(found, expected, 1e-4):
        worst = int((found - expected).abs().argmax())
        name = where(model, worst)
        try:
            expect(found, expected, moved, misconceptions, 1e-4)
        except Wrong as error:
            raise Wrong(f"{error}\nlargest difference in {name}: expected {float(expected[worst]):.5g}, "
                        f"found {float(found[worst]):.5g}") from None


def where(model, position):
    """The name of the parameter that holds this entry of flat(model)."""
    for name, p in model.named_parameters():
        if position < p.numel():
            return name
        position -= p.numel()


def clipped(model, split, batches, names, rate=0.1):
    """{name: change of the parameters} of ways to clip."""
    return {name: by_hand(model, split, batches, rates_of(rate), clip=CLIPS[name])[0] for name in names}


@points(2)
def a_step_for_each_batch_by_the_mean_gradient(student, rng):
    "For each batch: parameter -= lr * d mean cross_entropy / d parameter, of this batch alone (here by SGD)"
    model, split, batches = classifier(rng), texts(rng), deal(rng)
    model.head.bias.requires_grad_(False)  # its gradient is the largest: of the rest a sum, too, is below 1
    more = {SUM: by_hand(model, split, batches, rates_of(), total=True)[0],
            KEPT: by_hand(model, split, batches, rates_of(), keep=True)[0]}
    compare(student, model, split, batches, more | clipped(model, split, batches, [NORMALISED]))


@points(2)
def the_gradient_is_clipped_at_norm_1(student, rng):
    "A gradient of norm G > 1, over all trained parameters together, is divided by G before the step"
    model, split, batches = classifier(rng, steep=True), texts(rng), deal(rng)
    compare(student, model, split, batches,
            clipped(model, split, batches, [NO_CLIP, CLIP_EACH, CLIP_VALUES], rate=1e-3), rate=1e-3)


@points(1)
def the_schedule_steps_after_every_batch(student, rng):
    "The learning rate of step k is lr * decay(k), k = 0, 1, 2, ..., over batches: it starts at lr"
    model, split, batches = classifier(rng), texts(rng), deal(rng)
    same, sooner = rates_of(), [0.1 * 0.5**(step + 1) for step in range(len(batches))]
    compare(student, model, split, batches, {PER_EPOCH: by_hand(model, split, batches, same)[0],
            TOO_SOON: by_hand(model, split, batches, sooner)[0]}, decay=0.5)


@points(1)
def dropout_is_on(student, rng):
    "The model is in train mode while it trains, also if it comes in eval mode: dropout is part of the method"
    model, split, batches = classifier(rng, dropout=0.3), texts(rng), deal(rng)
    draws = int(torch.randint(2**31, (), generator=rng))
    torch.manual_seed(draws)
    expected, losses, _ = by_hand(model, split, batches, rates_of())
    without, eval_losses, _ = by_hand(model, split, batches, rates_of(), train=False)
    torch.manual_seed(draws)
    found, loss, _ = change(student, model, split, batches)
    called = f"{CALLED}, dropout 0.3, model.eval() before"
    expect(loss, losses.mean(), f"loss of {called}", {EVAL: eval_losses.mean()}, 1e-4)
    expect(found, expected, f"change of all parameters by {called}", {EVAL: without}, 1e-4)


@points(1)
def loss_and_accuracy_are_means_over_samples(student, rng):
    """loss = 1/N sum_i cross_entropy_i, accuracy = 1/N sum_i [largest logit of i is its label's], both in
    train mode, as they were before the step of i's batch"""
    for rate in (1e-3, 0.1, 0.3):
        model, split, batches = classifier(rng, steep=True), texts(rng), deal(rng)
        moved, *expected = by_hand(model, split, batches, rates_of(rate))
        after = copy.deepcopy(model)
        torch.nn.utils.vector_to_parameters(flat(model) + moved, after.parameters())
        _, *later = by_hand(after, split, batches, rates_of(0.0))
        _, *found = change(student, model, split, batches, rate)
        for what, value, right, then in zip(("loss", "accuracy"), found, expected, later):
            of_batches = torch.stack([part.mean() for part in right.split(BATCHES)])
            expect(value, right.mean(), f"{what} of {CALLED}",
                   {BATCH_MEANS: of_batches.mean(), SUMMED: right.sum(), AFTER: then.mean()}, 1e-4)


@points(1)
def what_is_frozen_stays(student, rng):
    "Only parameters with requires_grad are trained, and only they count in the norm"
    model, split, batches = classifier(rng, steep=True), texts(rng), deal(rng)
    thawed = copy.deepcopy(model)
    frozen = [*model.encoder.word_embeddings.parameters(), *model.encoder.layers.parameters()]
    for p in frozen:
        p.requires_grad_(False)
    trains = [p.requires_grad for p in model.parameters()]

    old = [0.0] * len(trains)

    def clip(gradients):  # all count, some move; the optimizer clears the gradients of these alone
        old[:] = together([g if moves else g + o for g, o, moves in zip(gradients, old, trains)])
        return [g * moves for g, moves in zip(old, trains)]

    wrong, _, _ = by_hand(thawed, split, batches, rates_of(), clip=clip)
    compare(student, model, split, batches, {THAWED: wrong})


@points(1)
def a_gradient_that_is_not_finite_is_reported(student, rng):
    "The mean loss is NaN if the norm of a gradient was infinite or NaN, though every loss may be finite"
    for bad in (math.inf, math.nan):
        model, split, batches = classifier(rng, steep=True), texts(rng), [torch.arange(sum(BATCHES)).numpy()]
        _, losses, right = by_hand(model, split, batches, rates_of())

        def spoil(model):
            model.head.bias.register_hook(lambda gradient: gradient * bad)

        called = f"train_epoch(model, split of 9 texts, one batch, SGD, schedule); the gradient of b is {bad}"
        _, loss, accuracy = change(student, model, split, batches, prepare=spoil)
        expect(accuracy, right.mean(), f"accuracy of {called}", {SUMMED: right.sum()}, 1e-4)
        expect(loss, math.nan, f"loss of {called}", {FINITE: losses.mean(), SUMMED: losses.sum()}, 1e-4)
