"""The likelihood of text under a model in one call: `sedd_scale.evaluate`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sedd_scale.arrays import IntArray
from sedd_scale.data.joint_reader import spread_blocks
from sedd_scale.errors import DataError
from sedd_scale.evaluation import PROTOCOLS, REMAINDERS
from sedd_scale.evaluation.bound import evaluate_bound
from sedd_scale.evaluation.corpora import open_corpus
from sedd_scale.evaluation.draw_plan import DEFAULT_MAX_BLOCKS
from sedd_scale.evaluation.result import BoundResult
from sedd_scale.evaluation.text_blocks import cut_documents
from sedd_scale.model.score_model import ScoreModel


def evaluate(
    model: ScoreModel,
    text: str | Sequence[str] | None = None,
    *,
    data: str | Path | None = None,
    tokens_nL: IntArray | Tensor | None = None,
    split: str | None = None,
    block_length: int | None = None,
    remainder: str = "drop",
    protocol: str = PROTOCOLS[0],
    draws: int | None = None,
    max_blocks: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> BoundResult:
    """Bound the negative log-likelihood of text, in nats per token, with its standard error.

    What `sedd-scale eval_ppl` prints, for a model in memory; of an autoregressive model the
    likelihood itself. Give exactly one of `text`, `data` and `tokens_nL`. Dropout is off meanwhile.

    Args:
        model: of `sedd_scale.load_pretrained` or `sedd_scale.new_model`.
        text: one document or several; EOS follows each, and the stream is cut into blocks.
        data: what --data of the command takes: a prepared dataset, or a file of text.
        tokens_nL: blocks of ids 0..N-1, n of L tokens each.
        split: of a prepared dataset ("valid").
        block_length: L of the blocks that text is cut into; the model's by default. That of a
            prepared dataset is what it is.
        remainder: of `text`, what becomes of tokens that fill no block: "drop", or "pad", where
            padding has no part in the number.
        protocol: "low-variance", a true bound with all its terms; "paper", the diffusion term alone
            by independent times; "any-order", for models without time conditioning.
        draws: times drawn a block (16; paper 1000), or orders (any-order 8).
        max_blocks: the most blocks, evenly spread (all; paper 1024; any-order 64).
        seed: of all draws; the same seed gives the same digits.
        batch_size: sequences in one network call.

    Returns:
        `nats_per_token` and its `stderr` (over draws) and `stderr_text` (over blocks too), `ci95`,
        `terms`, `bits_per_token`, `perplexity` and the nats per token of each block.

    Raises:
        DataError: nothing to evaluate, text without a tokenizer, tokens not the model's, or a
            number below 1.
        ConfigError: a protocol, draws or a batch size that cannot be used.
        CheckpointError: the model's loss is not finite.

    Source: Lou et al., theorem 3.6.
    """
    if sum(given is not None for given in (text, data, tokens_nL)) != 1:
        raise DataError("give exactly one of text, data and tokens_nL")
    for name, value in (("block_length", block_length), ("max_blocks", max_blocks)):
        if value is not None and value < 1:
            raise DataError(f"{name}={value}: give at least 1")
    most = DEFAULT_MAX_BLOCKS.get(protocol) if max_blocks is None else max_blocks
    if data is not None:
        corpus = open_corpus(
            data,
            tokenizer=model.tokenizer,
            num_tokens=model.graph.num_tokens,
            block_length=block_length,
            default_length=model.block_length,
            split=split,
            max_blocks=most,
        )
        blocks_nL, text_n, ids_n = corpus.blocks_nL, corpus.text_n, corpus.block_ids_n
    else:
        if text is not None:
            blocks_nL, text_n = _blocks_of_text(model, text, block_length, remainder)
        else:
            blocks_nL = torch.as_tensor(tokens_nL).cpu().numpy()
            text_n = np.full(len(blocks_nL), blocks_nL.shape[-1])
        ids_n = spread_blocks(len(blocks_nL), most or len(blocks_nL))
        blocks_nL, text_n = blocks_nL[ids_n], text_n[ids_n]
    was_training = model.training
    model.eval()
    try:
        return evaluate_bound(
            model,
            blocks_nL,
            draws=draws,
            seed=seed,
            batch_size=batch_size,
            protocol=protocol,
            block_ids_n=ids_n,
            text_n=text_n,
        )
    finally:
        model.train(was_training)


def _blocks_of_text(
    model: ScoreModel, text: str | Sequence[str], block_length: int | None, remainder: str
) -> tuple[IntArray, IntArray]:
    if model.tokenizer is None:
        raise DataError(
            "the model has no tokenizer to read text with: set model.tokenizer to the one it was "
            "trained with, or give tokens_nL"
        )
    length = block_length or model.block_length
    if length is None:
        raise DataError("the model does not name its block length: give block_length")
    if remainder not in REMAINDERS:
        raise DataError(f"remainder {remainder!r} is unknown: choose {' or '.join(REMAINDERS)}")
    documents = [text] if isinstance(text, str) else text
    found = cut_documents(
        documents, model.tokenizer, length, remainder=remainder, name="the text given"
    )
    return found.blocks_nL, found.text_n
