"""AdamW with the average against its definition, written out in float64."""

import copy

import numpy as np
import pytest
import torch

from sedd_scale.training.adamw import AdamWithEMA, ema_decay_after

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.99), 1e-8, 0.1


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in [(3, 4), (5,), (1,)]
    ]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in [(3, 4), (5,), (1,)]
    ]


@pytest.mark.parametrize("told", [False, True], ids=["plain", "scaled and skipped"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.5, 0.9999])
def test_follows_its_definition(ema_decay: float, told: bool) -> None:
    """Also with gradients to be divided by a number, and with a step that is only counted."""
    weights = parameters()
    optimizer = AdamWithEMA(
        weights, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, ema_decay=ema_decay
    )
    w = [p.detach().numpy().copy() for p in weights]
    ema = [a.copy() for a in w]
    m = [np.zeros_like(a) for a in w]
    v = [np.zeros_like(a) for a in w]
    for n in range(1, 41):
        for p, gradient in zip(weights, gradients(n)):
            p.grad = gradient
        scale = 1.0 + n % 3 if told else 1.0
        if told:
            optimizer.grad_scale = torch.tensor(scale)
            optimizer.found_inf = torch.tensor(float(n == 7))
        optimizer.step()
        if told and n == 7:
            continue
        d = min(ema_decay, (1 + n) / (10 + n))
        for i, g in enumerate(gradient.numpy() / scale for gradient in gradients(n)):
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g**2
            m_hat, v_hat = m[i] / (1 - BETAS[0] ** n), v[i] / (1 - BETAS[1] ** n)
            w[i] = w[i] - LR * DECAY * w[i] - LR * m_hat / (np.sqrt(v_hat) + EPS)
            ema[i] = d * ema[i] + (1 - d) * w[i]
    for i, p in enumerate(weights):
        state = optimizer.state[p]
        assert state["step"] == 40
        np.testing.assert_allclose(p.detach().numpy(), w[i], rtol=1e-12)
        np.testing.assert_allclose(state["ema"].numpy(), ema[i], rtol=1e-12)
        np.testing.assert_allclose(state["exp_avg"].numpy(), m[i], rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(state["exp_avg_sq"].numpy(), v[i], rtol=1e-12)


def test_float32_weights_are_those_of_plain_adamw() -> None:
    ours = [torch.nn.Parameter(p.float()) for p in parameters()]
    plain = copy.deepcopy(ours)
    optimizers = [
        AdamWithEMA(ours, lr=LR, betas=BETAS, weight_decay=DECAY),
        torch.optim.AdamW(plain, lr=LR, betas=BETAS, weight_decay=DECAY, fused=True),
    ]
    for n in range(5):
        for group in (ours, plain):
            for p, gradient in zip(group, gradients(n)):
                p.grad = gradient.float()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, plain):
        assert torch.equal(a, b)
        assert optimizers[0].state[a]["ema"].dtype == torch.float32


def test_the_average_starts_at_the_weights_before_the_first_update() -> None:
    weights = parameters()
    before = [p.detach().clone() for p in weights]
    optimizer = AdamWithEMA(weights, lr=LR, ema_decay=0.9999)
    for p, gradient in zip(weights, gradients(0)):
        p.grad = gradient
    optimizer.step()
    for p, old in zip(weights, before):
        torch.testing.assert_close(optimizer.state[p]["ema"], 2 / 11 * old + 9 / 11 * p.detach())


def test_the_decay_warms_up_to_its_value() -> None:
    decays = ema_decay_after(torch.arange(1, 200_000), 0.9999)
    assert decays[0] == 2 / 11
    assert (decays[1:] >= decays[:-1]).all()
    assert decays[-1] == 0.9999


def test_a_resumed_state_goes_on_bit_for_bit() -> None:
    def train(weights: list[torch.nn.Parameter], optimizer: AdamWithEMA, steps: range) -> None:
        for n in steps:
            for p, gradient in zip(weights, gradients(n)):
                p.grad = gradient
            optimizer.step()

    straight = parameters()
    reference = AdamWithEMA(straight, lr=LR)
    train(straight, reference, range(6))
    resumed = parameters()
    first = AdamWithEMA(resumed, lr=LR)
    train(resumed, first, range(3))
    second = AdamWithEMA(resumed, lr=LR)
    second.load_state_dict(first.state_dict())
    train(resumed, second, range(3, 6))
    for a, b in zip(straight, resumed):
        assert torch.equal(a, b)
        assert torch.equal(reference.state[a]["ema"], second.state[b]["ema"])


def test_what_has_no_gradient_is_left_alone_and_counts_for_itself() -> None:
    weights = parameters()
    optimizer = AdamWithEMA(weights, lr=LR)
    late = weights[1]
    before = late.detach().clone()
    for n in range(3):
        for p, gradient in zip(weights, gradients(n)):
            p.grad = None if p is late and n < 2 else gradient
        if n == 2:
            assert torch.equal(late, before) and not optimizer.state[late]
        optimizer.step()
    assert optimizer.state[weights[0]]["step"] == 3
    torch.testing.assert_close(
        optimizer.state[late]["ema"], 2 / 11 * before + 9 / 11 * late.detach()
    )
