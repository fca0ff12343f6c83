"""Samplers: noise to tokens around tokens that are given, all behind one function.

Every random number is a pure function of (seed, sample id, step, position), so a sample does not
depend on which others are drawn beside it or where (but for the rounding of the network's products,
which may differ between batches of another shape). Draws are made in float64: Gumbel noise in
single precision cuts the tail of a categorical off and so lowers the temperature
(arXiv 2409.02908). The laws and their sources are in docs/sampling.md.

B samples, L positions, M rows that may change, m rows of a chunk, V states, N tokens.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sedd_scale.errors import DataError
from sedd_scale.model.logit_model import LogitModel
from sedd_scale.sampling import AUTOREGRESSIVE, SAMPLERS
from sedd_scale.sampling.batch_state import BatchState, StepObserver
from sedd_scale.sampling.head_outputs import CausalOutputs, HeadOutputs
from sedd_scale.sampling.infill import check_prefix
from sedd_scale.sampling.keyed_draws import KeyedDraws
from sedd_scale.sampling.settings import SamplerSettings
from sedd_scale.sampling.token_law import TokenLaw


def draw(
    model: LogitModel,
    tokens_BL: Tensor,
    fixed_BL: Tensor,
    settings: SamplerSettings,
    *,
    lengths_B: Sequence[int] | None = None,
    **options: Any,
) -> Tensor:
    """Draw tokens at the positions that are not fixed: int64 [B, L] on the CPU.

    Args:
        model: a `ScoreModel`, or any other `LogitModel`.
        tokens_BL: tokens of the fixed positions; other entries are ignored.
        fixed_BL: bool; these positions keep their token and condition the others.
        settings: the sampler and all that goes with it.
        lengths_B: positions of each sample; those after them only fill the batch up: no attention
            reaches them, nothing is drawn there and their entries come back as given.
        options: the others of `start_batch`.

    Raises:
        ConfigError: a sampler or an option that the model does not have.
        DataError: a fixed token that is not one of the N, or shapes that do not fit; with an
            autoregressive model, something given after a free position.
        CheckpointError: the network's outputs are not finite.
    """
    batch = start_batch(model, tokens_BL, fixed_BL, settings, lengths_B=lengths_B, **options)
    run_batch(batch)
    drawn_BL = batch.state_BL.cpu()
    if lengths_B is None:
        return drawn_BL
    return torch.where(_within(lengths_B, tokens_BL.shape[1]), drawn_BL, tokens_BL.cpu().long())


@torch.no_grad()
def run_batch(batch: BatchState) -> None:
    """Run the sampler of the batch's settings to its end, in place."""
    if not bool(batch.free_R.any()):
        return
    run = SAMPLERS[batch.settings.sampler].fills[batch.model.kind]
    module, _, name = run.function.partition(".")
    getattr(importlib.import_module(f"sedd_scale.sampling.{module}"), name)(batch)


def start_batch(
    model: LogitModel,
    tokens_BL: Tensor,
    fixed_BL: Tensor,
    settings: SamplerSettings,
    *,
    seed: int | Sequence[int] = 0,
    sample_ids_B: Sequence[int] | None = None,
    lengths_B: Sequence[int] | None = None,
    on_step: StepObserver | None = None,
) -> BatchState:
    """A batch at time 1: free positions masked (absorb) or drawn uniformly; see `draw`.

    A model that predicts no first token has the tokenizer's EOS there, where none is given.

    Args:
        seed: one for all samples, or one per sample.
        sample_ids_B: which draw of its seed each sample is; 0..B-1 by default.
        on_step: called with (step, times [B], tokens [B, L]) after each step that changed tokens.
    """
    settings.check_kind(model.kind)
    if tokens_BL.dim() != 2 or tokens_BL.shape != fixed_BL.shape:
        raise DataError(
            f"tokens have shape {tuple(tokens_BL.shape)} and fixed positions "
            f"{tuple(fixed_BL.shape)}: give two equal shapes [B, L]"
        )
    batch, length = tokens_BL.shape
    seeds = [seed] * batch if isinstance(seed, int) else list(seed)
    ids = list(range(batch)) if sample_ids_B is None else list(sample_ids_B)
    for name, values in (("seed", seeds), ("sample_ids_B", ids), ("lengths_B", lengths_B)):
        if values is not None and len(values) != batch:
            raise DataError(f"{name} has {len(values)} entries for {batch} samples: give one each")
    free_BL, given_BL = ~fixed_BL.bool().cpu(), tokens_BL.cpu().long()
    ends_BE = None
    if lengths_B is not None:
        for number in lengths_B:
            if not 0 <= number <= length:
                raise DataError(f"a length of {number} does not fit tokens of shape [B, {length}]")
        within_BL = _within(lengths_B, length)
        free_BL &= within_BL
        given_BL = torch.where(within_BL, given_BL, 0)
        if not bool(within_BL.all()):
            # Padding of the batch is a document of its own, which no other position attends to.
            ends_BE = torch.tensor([[number, length] for number in lengths_B], device=model.device)
    if model.kind == AUTOREGRESSIVE:
        for row in range(batch):
            check_prefix(fixed_BL[row, : length if lengths_B is None else lengths_B[row]].numpy())
        if model.objective.first_is_given and bool(free_BL[:, 0].any()):
            given_BL = given_BL.clone()
            given_BL[free_BL[:, 0], 0] = model.first_token()
            free_BL[:, 0] = False
    model.graph.check_tokens(given_BL[~free_BL])
    law = TokenLaw(settings)
    draws = KeyedDraws(seeds, ids, length=length, device=model.device, dtype=law.dtype)
    free_BL, given_BL = free_BL.to(model.device), given_BL.to(model.device)
    if model.graph.mask_id is not None:
        state_BL = given_BL.masked_fill(free_BL, model.graph.mask_id)
    else:
        state_BL = torch.where(free_BL, draws.prior(model.graph.num_tokens), given_BL)
    outputs = CausalOutputs if model.causal else HeadOutputs
    return BatchState(
        model=model,
        settings=settings,
        state_BL=state_BL,
        free_R=free_BL.flatten(),
        draws=draws,
        outputs=outputs(model, state_BL.shape, ends_BE=ends_BE),
        law=law,
        observer=on_step,
    )


def _within(lengths_B: Sequence[int], length: int) -> Tensor:
    """Bool [B, L]: positions before each sample's length."""
    return torch.arange(length) < torch.tensor(list(lengths_B), dtype=torch.int64)[:, None]
