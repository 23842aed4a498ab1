"""What the tests of a task are written with. They import nothing of the project: they get the student's module.

A test is a function (student, rng) with a docstring, the rule that it checks, and points:

    @points(2)
    def dividing_by_t_changes_no_prediction(student, rng):
        "softmax(logits / T) has its largest entry where softmax(logits) has it"
        expect(student.f(x), right, "f(x (3, 2))", {"multiplied instead of divided": wrong})

rng is a torch.Generator of the seed, so that inputs are new for every seed.
"""

import torch


class Wrong(AssertionError):
    """A result that is not right; its message is what the student reads."""


def points(number):
    def mark(test):
        test.points = number
        return test
    return mark


def shown(value):
    """A number, or a small tensor, in few characters; of a large one its shape and first entries."""
    if isinstance(value, torch.Tensor):
        if value.numel() <= 9:
            return str([round(x, 5) for x in value.double().flatten().tolist()]) + f" of shape {tuple(value.shape)}"
        return f"{[round(x, 5) for x in value.double().flatten()[:4].tolist()]}... of shape {tuple(value.shape)}"
    return f"{value:.6g}" if isinstance(value, float) else repr(value)[:200]


def close(found, expected, tolerance):
    """Whether two tensors or numbers agree, in shape too, up to `tolerance` of the largest entry."""
    if found is None or isinstance(found, (str, dict, list)):
        return found == expected
    found, expected = (torch.as_tensor(x).detach().double() for x in (found, expected))
    if found.shape != expected.shape or not found.numel():
        return found.shape == expected.shape
    both_nan = found.isnan() & expected.isnan()
    error = torch.where(both_nan | (found == expected), 0.0, (found - expected).abs())
    return bool((error <= tolerance * expected.nan_to_num(0).abs().max().clamp(min=1e-12)).all())


def expect(found, expected, called, misconceptions=None, tolerance=1e-5):
    """Wrong unless found agrees with expected. `called` says what was called, with shapes.

    misconceptions {name: value}: what known wrong solutions give; the name of the one that was found is told.
    """
    if close(found, expected, tolerance):
        return
    lines = [f"called   {called}", f"expected {shown(expected)}", f"found    {shown(found)}"]
    lines += [f"this is what you get by: {name}" for name, value in (misconceptions or {}).items()
              if not close(value, expected, tolerance) and close(found, value, tolerance)][:1]
    raise Wrong("\n".join(lines))


def require(right, called, expected, found):
    """Wrong unless `right`: for rules that are no single value."""
    if not right:
        raise Wrong(f"called   {called}\nexpected {expected}\nfound    {shown(found)}")
