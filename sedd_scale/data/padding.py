"""Which positions of a block are text, and which only fill it up."""

import numpy as np

from sedd_scale.arrays import BoolArray, IntArray


def counted_positions(tokens_BL: IntArray, eos_id: int) -> BoolArray:
    """Whether each position of blocks packed by documents is text (its closing EOS included).

    Padding is EOS after a document's own EOS at the end of a block. No tokenizer here writes two
    EOS in a row, nor one at the end of a document, so the run of EOS that ends a block is one that
    counts and then padding; bool [B, L].
    """
    other = tokens_BL != eos_id
    length = tokens_BL.shape[1]
    # Tokens up to the last one that is not EOS, and then one EOS if there is one.
    last = length - np.argmax(other[:, ::-1], axis=1)
    last = np.where(other.any(axis=1), last, 0)
    counted: BoolArray = np.arange(length) <= last[:, None]
    return counted


def shorten(tokens_BL: IntArray, lengths_B: IntArray, eos_id: int) -> tuple[IntArray, BoolArray]:
    """The blocks with EOS in place of all that comes after a number of positions.

    Returns:
        The blocks, int64 [B, L], and which positions are left, bool [B, L].
    """
    kept: BoolArray = np.arange(tokens_BL.shape[1]) < lengths_B[:, None]
    return np.where(kept, tokens_BL, eos_id), kept
