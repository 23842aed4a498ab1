"""What the tests of a task are written with. They import nothing of the project: they are given the module.

A test is a function (student, rng) with a docstring, the rule that it checks, and points:

    @points(2)
    def dividing_by_t_changes_no_prediction(student, rng):
        "softmax(logits / T) has its largest entry where softmax(logits) has it"
        expect(student.f(x), right, "f(x (3, 2))", {"multiplied instead of divided": wrong})

rng is a torch.Generator of the seed, so that inputs are new for every seed.
"""

import torch

GET_BY = "this is what you get by: "  # and a misconception


class Wrong(AssertionError):
    """A result that is not right; its message is what the student reads."""


def points(number):
    def mark(test):
        test.points = number
        return test
    return mark


def listed(tensor, count, digits=6):
    numbers = ", ".join(f"{x:.{digits}g}" for x in tensor.detach().double().flatten()[:count].tolist())
    return f"[{numbers}{', ...' * (tensor.numel() > count)}]"


def shown(value, digits=6):
    """A number, the first entries and the shape of a tensor, or the text of anything else; all short."""
    if isinstance(value, torch.Tensor) and value.ndim:
        return f"{listed(value, 9 if value.numel() <= 9 else 4, digits)} of shape {tuple(value.shape)}"
    value = value.item() if isinstance(value, torch.Tensor) else value
    return f"{value:.{digits}g}" if isinstance(value, float) else " ".join(repr(value).split())[:200]


def numbers_of(value):
    """A number or a tensor, or what can be made one, as a float64 tensor; None for anything else."""
    if value is None or isinstance(value, (str, dict, list)):
        return None
    try:
        return torch.as_tensor(value, dtype=torch.double).detach()
    except (TypeError, ValueError, RuntimeError):
        return None


def differing(found, expected, tolerance):
    """Where two float64 tensors of one shape differ, by `tolerance` of the largest expected entry."""
    error = torch.where(found.isnan() & expected.isnan() | (found == expected), 0.0, (found - expected).abs())
    limit = tolerance * expected.nan_to_num(0).abs().max().clamp(min=1e-12) if expected.numel() else 0.0
    return ~(error <= limit)


def close(found, expected, tolerance):
    """Whether two tensors or numbers agree, in shape too, up to `tolerance` of the largest entry."""
    first, second = numbers_of(found), numbers_of(expected)
    if first is None or second is None:
        return isinstance(found, type(expected)) and found == expected
    return first.shape == second.shape and not differing(first, second, tolerance).any()


def told_apart(expected, found, tolerance):
    """The texts of two values that are not close; they are never the same.

    Of large tensors the first entry that differs is shown, with as many digits as are needed; of long texts,
    what surrounds the first difference.
    """
    numbers, where = [numbers_of(value) for value in (expected, found)], None
    if None not in numbers and numbers[0].shape == numbers[1].shape and numbers[0].numel() > 9:
        places = differing(*reversed(numbers), tolerance).nonzero().tolist()
        where = f"at {places[0]}, the first of {len(places)} that differ, in "
    for digits in range(6, 18):
        texts = [shown(value, digits) for value in (expected, found)]
        if where:
            texts = [f"{shown(x[tuple(places[0])], digits)} {where}{shown(x)}" for x in numbers]
        if texts[0].strip("'") != texts[1].strip("'"):
            return texts
    texts = [" ".join(repr(value).split()) for value in (expected, found)]
    same = next((i for i, (x, y) in enumerate(zip(*texts)) if x != y), min(map(len, texts)))
    if texts[0].strip("'") == texts[1].strip("'"):
        return [f"{text[:150]}, a {type(value).__name__}" for text, value in zip(texts, (expected, found))]
    return [f"...{text[max(0, same - 40):same + 100]}" for text in texts]


def expect(found, expected, called, misconceptions=None, tolerance=1e-5):
    """Wrong unless found agrees with expected. `called` says what was called, with shapes.

    misconceptions {name: value}: what known wrong solutions give; the name of the one that was found is told.
    """
    if close(found, expected, tolerance):
        return
    first, second = told_apart(expected, found, tolerance)
    lines = [f"called   {called}", f"expected {first}", f"found    {second}"]
    lines += [GET_BY + name for name, value in (misconceptions or {}).items()
              if not close(value, expected, tolerance) and close(found, value, tolerance)][:1]
    raise Wrong("\n".join(lines))


def require(right, called, expected, found, misconception=None):
    """Wrong unless `right`: for rules that are no single value."""
    if not right:
        named = f"\n{GET_BY}{misconception}" if misconception else ""
        raise Wrong(f"called   {called}\nexpected {expected}\nfound    {shown(found)}{named}")
