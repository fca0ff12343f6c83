"""The linear map to scores and the score entropy, beside the textbook way to compute them.

Both sides start from the head's input and end with the gradients of hidden states, weight and bias.
The textbook side computes log-scores of every state at every position and lets autograd walk back
through the definition.
"""

import argparse
import functools
from typing import TYPE_CHECKING, Any

from sedd_scale.benchmark.arguments import add_measured_arguments
from sedd_scale.benchmark.report import environment, run_measured, side_by_side
from sedd_scale.cli import add_command
from sedd_scale.config.graph_facts import GRAPHS
from sedd_scale.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from sedd_scale.diffusion.graphs import Graph


def add_arguments(subparsers: Any) -> None:
    """Register `loss` and its options."""
    parser = add_command(
        subparsers,
        "loss",
        help="head and score entropy, with their gradients",
        example="sedd-scale benchmark loss --baseline --json",
    )
    parser.add_argument("--batch-size", type=int, default=2, help="sequences (default: 2)")
    parser.add_argument("--block-length", type=int, default=1024, help="positions (default: 1024)")
    parser.add_argument("--vocab-size", type=int, default=50257, help="tokens N (default: 50257)")
    parser.add_argument("--width", type=int, default=768, help="hidden size (default: 768)")
    parser.add_argument("--graph", choices=tuple(GRAPHS), default="absorb")
    parser.add_argument(
        "--unscaled", action="store_true", help="absorb: the logits are the log-scores themselves"
    )
    parser.add_argument(
        "--mean", action="store_true", help="uniform: the logits are of the clean token's law"
    )
    parser.add_argument(
        "--masked-fraction", type=float, default=0.5, help="of the positions (default: 0.5)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    add_measured_arguments(parser, repeats=5, baseline="the textbook way")
    parser.set_defaults(run=functools.partial(run_measured, measure=measure))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report; both sides' seconds and memory."""
    import torch

    from sedd_scale.benchmark.measure import median_seconds, peak_bytes
    from sedd_scale.diffusion.graphs import make_graph
    from sedd_scale.diffusion.row_law import row_law
    from sedd_scale.diffusion.schedules import make_schedule
    from sedd_scale.parallel.vocab import linear_score_entropy, score_targets
    from sedd_scale.parallel.vocab_shard import VocabShard

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
    batch, length, width = arguments.batch_size, arguments.block_length, arguments.width
    graph = make_graph(arguments.graph, arguments.vocab_size)
    scaled = arguments.graph == "absorb" and not arguments.unscaled
    if arguments.mean and graph.mask_id is not None:
        raise ConfigError("--mean is of --graph uniform: add it, or leave --mean out")
    torch.manual_seed(0)
    weight = torch.randn(graph.num_states, width, device=device) / width**0.5
    bias = torch.randn(graph.num_states, device=device)
    hidden_LBH = torch.randn(length, batch, width, device=device)
    hidden_LBH, weight, bias = (
        part.to(dtype).requires_grad_() for part in (hidden_LBH, weight, bias)
    )
    leaves = (hidden_LBH, weight, bias)
    clean_BL = torch.randint(graph.num_tokens, (batch, length))
    noisy_BL, t = clean_BL.clone(), arguments.masked_fraction
    changed = torch.randperm(batch * length)[: round(t * batch * length)]
    noisy_BL.view(-1)[changed] = (
        torch.randint(graph.num_tokens, changed.shape) if graph.mask_id is None else graph.mask_id
    )
    schedule = make_schedule("loglinear")
    t_B = torch.full((batch,), t, dtype=torch.float64)
    noise_B3 = torch.stack(
        [schedule.sigma(t_B), schedule.rate(t_B), schedule.rate_over_expm1(t_B)], dim=1
    )
    targets = score_targets(graph, clean_BL=clean_BL, noisy_BL=noisy_BL, noise_B3=noise_B3)
    num_rows = len(targets.rows_M)
    targets = targets.to(device)
    law = row_law(graph, scaled=scaled, mean=arguments.mean)
    shard = VocabShard(law, 0, graph.num_tokens, None)
    on_device = [tensor.to(device) for tensor in (clean_BL, noisy_BL, noise_B3)]

    def forget_gradients() -> None:
        for leaf in leaves:
            leaf.grad = None

    def ours() -> "Tensor":
        forget_gradients()
        loss = linear_score_entropy(hidden_LBH, weight, bias, targets, shard)
        loss.backward()
        return loss.detach()

    def baseline() -> "Tensor":
        forget_gradients()
        loss = textbook_loss(*leaves, *on_device, graph=graph, scaled=scaled, mean=arguments.mean)
        loss.backward()
        return loss.detach()

    programs = [ours, baseline] if arguments.baseline else [ours]
    losses = [float(program()) for program in programs]
    seconds = median_seconds(programs, repeats=arguments.repeats, warm_up=0)
    own_gradients = sum(leaf.nbytes for leaf in leaves[1:])
    extra = []
    for program in programs:
        forget_gradients()
        extra.append((peak_bytes(program) - own_gradients) / 1e6)
    # A multiplication and an addition, for the product itself and for its two gradients.
    flops_per_row = 6 * graph.num_tokens * width
    return {
        "part": "loss",
        "graph": graph.name,
        "scaled": scaled,
        "mean": arguments.mean,
        "batch": batch,
        "length": length,
        "vocab": graph.num_tokens,
        "width": width,
        "rows": num_rows,
        "dtype": arguments.precision,
        "repeats": arguments.repeats,
        **side_by_side(seconds, extra, tokens=batch * length),
        "loss": losses[0],
        "baseline_loss": losses[1] if arguments.baseline else None,
        "flops_required": flops_per_row * num_rows,
        "flops_dense": flops_per_row * batch * length,
        "flops_per_second": flops_per_row * num_rows / seconds[0],
        **environment(),
    }


def textbook_loss(
    hidden_LBH: "Tensor",
    weight: "Tensor",
    bias: "Tensor",
    clean_BL: "Tensor",
    noisy_BL: "Tensor",
    noise_B3: "Tensor",
    *,
    graph: "Graph",
    scaled: bool,
    mean: bool = False,
) -> "Tensor":
    """Mean score entropy in nats per token from log-scores [B, L, V] of every state and position.

    Source: arXiv 2310.16834, the diffusion-weighted denoising score entropy of section 3 with the
    ratios of the graph written out, and the scaling of appendix C; of the mean parametrisation,
    arXiv 2412.10193, section 3.
    """
    import torch
    import torch.nn.functional as F

    log_score_BLV = F.linear(hidden_LBH.transpose(0, 1), weight, bias).float()
    sigma_B, rate_B, _ = noise_B3.float().unbind(1)
    expm1_BL = torch.expm1(sigma_B)[:, None].expand_as(noisy_BL)
    num_tokens = graph.num_tokens
    if scaled and not mean:
        log_score_BLV = (
            log_score_BLV
            - (expm1_BL.log() + torch.log(torch.tensor(float(num_tokens))))[:, :, None]
        )
    if mean:
        law_BLV = torch.softmax(log_score_BLV[:, :, :num_tokens], dim=-1)
        if graph.mask_id is not None:
            log_score_BLV = F.pad(law_BLV.log() - expm1_BL.log()[:, :, None], (0, 1))
        else:
            log_score_BLV = torch.log1p(num_tokens / expm1_BL[:, :, None] * law_BLV)
            log_score_BLV = log_score_BLV - log_score_BLV.gather(-1, noisy_BL[:, :, None])
    log_score_BLV = log_score_BLV.scatter(-1, noisy_BL[:, :, None], 0.0)
    if graph.mask_id is not None:
        masked_BL = noisy_BL == graph.mask_id
        log_score_MV = log_score_BLV[masked_BL]
        ratio_M = 1.0 / expm1_BL[masked_BL]
        positive_M = log_score_MV[:, :num_tokens].exp().sum(-1)
        clean_M1 = clean_BL[masked_BL][:, None]
        negative_M = ratio_M * log_score_MV.gather(-1, clean_M1).squeeze(-1)
        entropy_M = positive_M - negative_M + ratio_M * (ratio_M.log() - 1.0)
        rate_M = rate_B[:, None].expand_as(noisy_BL)[masked_BL]
        return (rate_M * entropy_M).sum() / noisy_BL.numel()
    ratio_BL = 1.0 / (1.0 + num_tokens / expm1_BL)
    # The own entry is 0: it adds nothing to the sum of log-scores and 1 to the sum of scores.
    positive_BL = log_score_BLV.exp().sum(-1) - 1.0
    total_BL = log_score_BLV.sum(-1)
    clean_BL_score = log_score_BLV.gather(-1, clean_BL[:, :, None]).squeeze(-1)
    same_BL = ratio_BL * total_BL - (num_tokens - 1) * ratio_BL * (ratio_BL.log() - 1.0)
    differs_BL = (
        total_BL
        - clean_BL_score
        + clean_BL_score / ratio_BL
        + (num_tokens - 2)
        - (1.0 / ratio_BL) * (-ratio_BL.log() - 1.0)
    )
    entropy_BL = positive_BL - torch.where(clean_BL == noisy_BL, same_BL, differs_BL)
    return (rate_B[:, None] / num_tokens * entropy_BL).mean()
