"""Bytes that one micro-batch leaves on a rank between its forward and its backward pass.

What autograd keeps is counted tensor by tensor, as sedd_scale/model makes them. Attention keeps its
inputs, its output and one number a row and head: scores are never materialised (flash-attn, or
PyTorch's fused scaled_dot_product_attention). Small tensors, those of one row a sequence, are left
out.

Sizes are in bytes for a micro-batch of B sequences of L tokens; under sequence parallelism a rank
holds 1/tensor of the positions of what lies between tensor-parallel layers ("stream" below).
"""

from dataclasses import dataclass

from sedd_scale.config import Config
from sedd_scale.planning.model_states import BYTES, FLOAT32
from sedd_scale.planning.parameters import num_states

# Of the loss on a GPU: the memory that says how many rows of logits, counted in float32, make a
# chunk, and the fewest.
GPU_CHUNK_BYTES = 2**30
MIN_CHUNK_ROWS = 16


@dataclass(frozen=True)
class StageActivations:
    """Bytes of one pipeline stage (or the whole network) on one rank.

    Attributes:
        kept: kept for the backward pass, all micro-batches in flight together.
        boundary: what is received from and sent to the neighbouring stages.
        workspace: the most that lives beside them: the loss and its gradients, or a block's
            backward pass with what it recomputes.
    """

    kept: int
    boundary: int
    workspace: int


def stage_activations(
    config: Config,
    *,
    vocab_size: int,
    block_length: int,
    stage: int,
    layers: range,
    in_flight: int,
) -> StageActivations:
    """Bytes of the layers `layers` (0 the embedding, the last the head) of stage `stage`.

    Args:
        in_flight: micro-batches between their forward and backward pass at one time.
    """
    model, parallel = config.model, config.parallel
    weight_bytes = BYTES[config.training.precision]
    residual_bytes = BYTES[model.residual_dtype]
    tokens = config.training.micro_batch * block_length
    split = parallel.tensor if parallel.sequence_parallel else 1
    stream = tokens * model.hidden_size // split
    every = parallel.recompute_every

    block = _block_bytes(config, stream, tokens)
    kept = 0
    recomputed = False
    for layer in layers:
        if 1 <= layer <= model.num_layers:
            if every and (layer - 1) % every == 0:
                kept += residual_bytes * stream
                if parallel.recompute_mode == "selective":
                    kept += _product_bytes(config, tokens)
                recomputed = True
            else:
                kept += block
    # Gradients of the MLP's inner tensors, and of the stream in float32.
    inner = tokens * (config.trunk.inner_rows + config.trunk.inner) // parallel.tensor
    workspace = weight_bytes * inner + 4 * FLOAT32 * stream
    workspace += block if recomputed else 0
    if layers[-1] == model.num_layers + 1:
        # The norm's output, and the linear map's input at every position.
        kept += weight_bytes * (stream + tokens * model.hidden_size)
        rows = -(-num_states(config, vocab_size) // parallel.tensor)
        loss, loss_gradients = _loss_bytes(config, rows, tokens)
        workspace = max(loss, workspace + loss_gradients)
    return StageActivations(
        kept=in_flight * kept,
        boundary=_boundary_bytes(config, stream, residual_bytes, stage, in_flight),
        workspace=workspace,
    )


def _block_bytes(config: Config, stream: int, tokens: int) -> int:
    """What one block keeps; `stream` is numbers, not bytes."""
    trunk = config.trunk
    weight_bytes = BYTES[config.training.precision]
    per_branch = {
        "norm's output": weight_bytes,
        "modulated norm, the linear map's input": weight_bytes,
        "branch before its gate": weight_bytes if config.model.cond_width else 0,
    }
    split = {
        "queries, keys and values": trunk.qkv_rows,
        "turned queries and keys": trunk.turned_rows,
        "attention's output": trunk.query_rows,
        "before and after the activation": trunk.inner_rows + trunk.inner,
    }
    branches = 2 * sum(per_branch.values()) * stream
    shards = weight_bytes * tokens * sum(split.values()) // config.parallel.tensor
    return branches + shards + _log_sum_bytes(config, tokens)


def _product_bytes(config: Config, tokens: int) -> int:
    """What one block keeps besides its input where all but its products is recomputed."""
    trunk = config.trunk
    weight_bytes = BYTES[config.training.precision]
    # Queries, keys and values, attention's output, and the MLP's inner product.
    kept = trunk.qkv_rows + trunk.query_rows + trunk.inner_rows
    inner = tokens * kept // config.parallel.tensor
    # Of row-parallel products each rank holds its part of the sum, at every position.
    outer = 2 * tokens * trunk.width
    return weight_bytes * (inner + outer) + _log_sum_bytes(config, tokens)


def _log_sum_bytes(config: Config, tokens: int) -> int:
    return FLOAT32 * tokens * config.trunk.heads // config.parallel.tensor


def _loss_bytes(config: Config, rows: int, tokens: int) -> tuple[int, int]:
    """Bytes at the loss's peak, and of the gradients it keeps for the backward pass.

    Every row counts. Logits of float32 become their gradient in place (the Triton kernels); beside
    those of bfloat16 weights, in float32 too, it has a place of its own.

    Args:
        rows: rows of the head's weight on this rank.
    """
    width, weight_bytes = config.model.hidden_size, BYTES[config.training.precision]
    chunk_rows = min(tokens, max(MIN_CHUNK_ROWS, GPU_CHUNK_BYTES // (FLOAT32 * rows)))
    hidden, weight = weight_bytes * tokens * width, weight_bytes * rows * width
    # The weight's gradient adds up in float32; beside it a chunk's part, or its copy at the end.
    chunk = logit_bytes(weight_bytes) * chunk_rows * rows
    peak = hidden + FLOAT32 * rows * width + weight + chunk
    return peak, hidden + weight


def logit_bytes(weight_bytes: int) -> int:
    """Bytes of a logit and its gradient on a GPU."""
    return FLOAT32 if weight_bytes == FLOAT32 else FLOAT32 + weight_bytes


def _boundary_bytes(
    config: Config, stream: int, residual_bytes: int, stage: int, in_flight: int
) -> int:
    """Hidden states and the conditioning as further positions, as DeepSpeed's buffers hold them."""
    model, pipeline = config.model, config.parallel.pipeline
    if pipeline == 1:
        return 0
    cond_rows = -(-model.cond_width // model.hidden_size)
    extra = config.training.micro_batch * cond_rows * model.hidden_size
    packed = residual_bytes * (stream + extra)
    received, sent = stage > 0, stage < pipeline - 1
    # In flight: the received tensor beside the clone the stage works on, and the packed output.
    # Once: the receive buffer, the input's gradient and the output's gradient.
    return packed * (in_flight * (received + sent) + 2 * received + sent)
