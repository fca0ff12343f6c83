"""The first layer: what the network is conditioned on."""

import torch

from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.model.parameters import logical_parameters
from sedd_scale.parallel.layout import initialize_layout
from tests.model.small_network import gradients, noisy_batch, small_network

GRAPH = make_graph("absorb", 20)


def test_without_time_conditioning_sigma_changes_nothing() -> None:
    layout = initialize_layout()
    inputs, targets, _ = noisy_batch(GRAPH)
    noisy_BL, sigma_B, _ = inputs
    given, constant = (
        small_network(GRAPH, layout, scaled=True, time_conditioning=conditioned)
        for conditioned in (True, False)
    )
    shapes = [
        {p.name: p.shape for p in logical_parameters(network, layout)}
        for network in (given, constant)
    ]
    assert shapes[0] == shapes[1]
    with torch.no_grad():
        at_sigma, at_zero = (given.hidden(noisy_BL, sigma) for sigma in (sigma_B, 0 * sigma_B))
        assert not torch.equal(at_sigma, at_zero)
        for sigma in (sigma_B, 5 * sigma_B):
            assert torch.equal(constant.hidden(noisy_BL, sigma), at_zero)
    # Every parameter still has a gradient: no engine needs to know.
    constant(inputs, targets).backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(constant, layout).values())
