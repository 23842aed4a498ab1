"""The smallest model: Kumar et al.'s linear network shows what the paper's Cor. 4.3 says."""

import numpy as np
import pytest
import torch

from lab import linear_toy


@pytest.fixture(scope="module")
def mean(tmp_path_factory):
    return linear_toy.work(tmp_path_factory.mktemp("toy") / "toy.png")


def test_off_the_training_subspace_no_feature_moves_on_it_ft_moves_them_more_than_lp_ft(mean):
    """Cor. 4.3, and why LP first: its head leaves small errors."""
    (ft_loss, _, ft_on, ft_off), (loss, _, on, off) = (mean[name][-1].tolist() for name in ("FT", "LP-FT"))
    assert ft_loss < 1e-6 and loss < 1e-6  # both fit the training inputs
    assert ft_off < 1e-12 and off < 1e-12 and 0 < on < 0.25 * ft_on


def test_ft_stays_wrong_out_of_distribution_and_lp_ft_does_not(mean):
    """The mean over ten drawn problems; in a single one FT can be lucky."""
    ft, lp, lpft = (float(mean[name][-1, 1]) for name in ("FT", "LP", "LP-FT"))
    assert lpft < 0.25 * ft and lpft < 1.2 * lp


def test_the_gradient_steps_are_those_of_autograd():
    x, y, *_, B_0, _, v = linear_toy.problem()
    _, (v_1, B_1) = linear_toy.fine_tune(x, y, v, B_0, steps=1, lr=0.01)
    x, y, a, B = (torch.tensor(part) for part in (x, y, v, B_0))
    a.requires_grad_(), B.requires_grad_()
    (0.5 * (x @ B.T @ a - y).square().mean()).backward()
    assert np.allclose(v_1, v - 0.01 * a.grad.numpy()) and np.allclose(B_1, B_0 - 0.01 * B.grad.numpy())


def test_the_kernel_of_lora_concentrates_around_that_of_ft():
    """Prop. 4.4: divided by sigma^2 r, whatever sigma is, it nears F as 1 / sqrt(r), and on average it is F."""
    for sigma in (0.1, 3.0):
        errors = [np.mean([linear_toy.lora_kernel_error(r, sigma, seed) for seed in range(10)]) for r in (8, 128)]
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.25) and errors[1] < 0.3


def test_the_figure_is_written(tmp_path, capsys):
    assert linear_toy.main(["--out", str(tmp_path / "toy.png")]) == 0
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG") and "LP-FT" in capsys.readouterr().out
