"""The run of the layout table as a plain PyTorch loop: what every layout must reproduce."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sedd_scale.config import Config
from sedd_scale.data.padding import counted_positions
from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.diffusion.schedules import schedule_of
from sedd_scale.diffusion.score_entropy import RowNoise
from sedd_scale.model.network import ScoreNetwork, layer_builders
from sedd_scale.model.parameters import logical_parameters
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.training.loop import open_dataset
from tests.diffusion.reference import corrupt_batch, log_score_score_entropy, log_scores_from_logits
from tests.plain_network import PlainNetwork
from tests.published import to_logical, to_published


@dataclass(frozen=True)
class PlainRun:
    """Losses and gradient norms step by step; final weights and their average by logical name."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]


def plain_training(config: Config, dtype: torch.dtype = torch.float32) -> PlainRun:
    """Whole batches, whole log-scores, autograd, torch's AdamW and a hand-written average."""
    config, corpus = open_dataset(config)
    graph = make_graph(config.graph.name, corpus.vocab_size)
    schedule = schedule_of(config)
    scaled = config.resolved_scale_by_sigma
    model, optimizer, training = config.model, config.optimizer, config.training
    network = PlainNetwork(
        num_states=graph.num_states,
        width=model.hidden_size,
        layers=model.num_layers,
        heads=model.num_heads,
        cond_dim=model.cond_dim,
        mlp_ratio=model.mlp_ratio,
    ).to(dtype)
    layout = initialize_layout()
    start = ScoreNetwork(layer_builders(config, graph, layout))
    initial = {
        logical.name: logical.parameter.detach() for logical in logical_parameters(start, layout)
    }
    network.load_state_dict(
        to_published(initial, num_layers=model.num_layers, num_heads=model.num_heads)
    )
    averages = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    adam = torch.optim.AdamW(
        network.parameters(),
        lr=optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )
    loader = corpus.train_loader(config)
    losses, norms = [], []
    for step in range(training.steps):
        sample_ids = loader.sample_ids(step, range(training.global_batch))
        batch = corrupt_batch(
            torch.from_numpy(loader.read_samples(sample_ids)),
            sample_ids_B=sample_ids,
            step=step,
            seed=training.seed,
            global_batch=training.global_batch,
            graph=graph,
            schedule=schedule,
            t_min=config.noise.t_min,
        )
        is_text_BL = torch.ones_like(batch.clean_BL, dtype=torch.bool)
        if corpus.packing == "documents":
            is_text_BL = torch.from_numpy(counted_positions(batch.clean_BL.numpy(), corpus.eos_id))
        noisy_BL = torch.where(is_text_BL, batch.noisy_BL, batch.clean_BL)
        logits = network(noisy_BL, batch.sigma_B)
        log_score = log_scores_from_logits(
            logits, noisy_BL, batch.sigma_B, graph=graph, scaled=scaled
        )
        nats_BL = log_score_score_entropy(
            log_score.double(),
            noisy_BL,
            batch.clean_BL,
            RowNoise(batch.sigma_B, batch.rate_B, batch.rate_over_expm1_B),
            graph=graph,
        )
        loss = nats_BL[is_text_BL].mean()
        adam.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(network.parameters(), optimizer.clip)))
        for group in adam.param_groups:
            group["lr"] = optimizer.lr * min(1.0, (step + 1) / optimizer.warmup_steps)
        adam.step()
        decay = min(optimizer.ema_decay, (2 + step) / (11 + step))
        for name, weight in network.named_parameters():
            averages[name].lerp_(weight.detach(), 1 - decay)
        losses.append(loss.item())
    trained = {name: weight.detach() for name, weight in network.named_parameters()}
    return PlainRun(
        losses=losses,
        grad_norms=norms,
        weights=to_logical(trained, num_heads=model.num_heads),
        averages=to_logical(averages, num_heads=model.num_heads),
    )
