"""Every schedule is one curve: its parts are each other's derivatives, inverses and quotients."""

import math

import pytest
import torch
from safetensors.torch import load_file

from sedd_scale.diffusion.schedules import Geometric, LogLinear, make_schedule
from sedd_scale.errors import ConfigError
from tests.repository import GOLDEN

NAMES = ("loglinear", "geometric", "cosine", "linear")
TIMES = torch.linspace(1e-3, 1.0, 500, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_one_curve_agree(name):
    schedule = make_schedule(name)
    t = TIMES.clone().requires_grad_()
    sigma = schedule.sigma(t)
    (slope,) = torch.autograd.grad(sigma.sum(), t)
    rate = schedule.rate(t.detach())
    torch.testing.assert_close(rate, slope, rtol=1e-10, atol=0)
    sigma = sigma.detach()
    torch.testing.assert_close(
        schedule.move_probability(TIMES), -torch.expm1(-sigma), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        schedule.rate_over_expm1(TIMES), rate / torch.expm1(sigma), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("name", NAMES)
def test_noise_grows_and_ends_finite(name):
    schedule = make_schedule(name)
    sigma = schedule.sigma(TIMES)
    assert (sigma.diff() > 0).all()
    assert sigma[0] > 0 and torch.isfinite(sigma[-1])
    assert schedule.move_probability(TIMES[-1:]) > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_inverse(name):
    schedule = make_schedule(name)
    # Where sigma nears 20, m is within 1e-9 of 1 and holds few digits of t: invert the m that a
    # float can tell apart.
    t = TIMES[schedule.sigma(TIMES) < 12]
    back = schedule.time_of_move_probability(schedule.move_probability(t))
    torch.testing.assert_close(back, t, rtol=1e-9, atol=1e-9)
    ends = schedule.time_of_move_probability(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_in_and_out_is_rounded_once(name, dtype):
    schedule = make_schedule(name)
    t = TIMES.to(dtype)
    for part in ("sigma", "rate", "move_probability", "rate_over_expm1"):
        value = getattr(schedule, part)(t)
        assert value.dtype == dtype
        exact = getattr(schedule, part)(t.double())
        torch.testing.assert_close(value, exact.to(dtype), rtol=0, atol=0)


def test_known_values():
    t = torch.tensor([1e-3, 0.05, 0.5, 1.0], dtype=torch.float64)
    loglinear = LogLinear(1e-3)
    assert torch.equal(loglinear.rate_over_expm1(t), 1 / t)
    torch.testing.assert_close(loglinear.move_probability(t), 0.999 * t)
    torch.testing.assert_close(loglinear.rate(t), 0.999 / (1 - 0.999 * t))
    torch.testing.assert_close(
        Geometric(1e-4, 20.0).sigma(torch.tensor([0.0, 1.0], dtype=torch.float64)),
        torch.tensor([1e-4, 20.0], dtype=torch.float64),
    )
    cosine = make_schedule("cosine", eps=1e-3)
    torch.testing.assert_close(
        torch.exp(-cosine.sigma(t)), 1e-3 + 0.999 * torch.cos(math.pi / 2 * t)
    )
    assert make_schedule("linear", sigma_max=8.0).sigma(t)[2].item() == 4.0


def test_refuses_what_is_no_schedule():
    with pytest.raises(ConfigError, match=r"sqrt.*loglinear"):
        make_schedule("sqrt")
    with pytest.raises(ConfigError, match=r"noise\.eps"):
        make_schedule("loglinear", eps=0.0)
    with pytest.raises(ConfigError, match=r"noise\.sigma_min"):
        make_schedule("geometric", sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(ConfigError, match=r"noise\.sigma_max"):
        make_schedule("linear", sigma_max=-1.0)


@pytest.mark.parametrize("case", ["absorb-loglinear", "uniform-geometric"])
def test_reference_numbers(case):
    golden = load_file(GOLDEN / case / "golden.safetensors")
    schedule = make_schedule(case.split("-")[1])
    torch.testing.assert_close(schedule.sigma(golden["t"]), golden["sigma"], rtol=1e-5, atol=0)
    torch.testing.assert_close(schedule.rate(golden["t"]), golden["dsigma"], rtol=1e-5, atol=0)
