"""A tokenizer for a model whose vocabulary is not quite the tokenizer's.

Programs round vocabularies up or add tokens that no text has, such as Duo's [PAD] behind GPT-2's
50,257; and a mask that is among the tokenizer's own ids is the last of ours.
"""

from collections.abc import Sequence

import numpy as np

from sedd_scale.arrays import IntArray
from sedd_scale.errors import DataError
from sedd_scale.tokenizers.base import Tokenizer

# More than that is another tokenizer: vocabularies are rounded up to multiples of 128 at most.
MOST_UNUSED = 127


class AdaptedTokenizer(Tokenizer):
    """Another tokenizer with ids of a model.

    Args:
        inner: the tokenizer.
        num_tokens: N of the model; those behind the tokenizer's stand for no text.
        mask_id: of the tokenizer's ids, the mask; those behind it move up by one.
    """

    def __init__(self, inner: Tokenizer, num_tokens: int, mask_id: int | None = None) -> None:
        self._inner = inner
        self._moved = inner.vocab_size if mask_id is None else mask_id
        self._num_known = inner.vocab_size - (mask_id is not None)
        self.kind = inner.kind  # type: ignore[misc]
        self.eos_in_text = inner.eos_in_text  # type: ignore[misc]
        self.vocab_size = num_tokens
        self.eos_id = inner.eos_id - (inner.eos_id > self._moved)
        unknown = inner.unknown_id
        self.unknown_id = None if unknown is None else unknown - (unknown > self._moved)

    def encode_batch(self, texts: Sequence[str]) -> list[IntArray]:
        """The ids of each text."""
        found = []
        for ids in self._inner.encode_batch(texts):
            if np.any(ids == self._moved):
                raise DataError("a text spells the mask: leave it out, or --mask-id is another")
            found.append(ids - (ids > self._moved))
        return found

    def _decode(self, ids: list[int]) -> str:
        known = [token for token in ids if token < self._num_known]
        return self._inner.decode(token + (token >= self._moved) for token in known)

    def normalize(self, text: str) -> str:
        """As the tokenizer does."""
        return self._inner.normalize(text)

    def files(self) -> dict[str, bytes]:
        """Those of the tokenizer, whose fingerprint this has."""
        return self._inner.files()


def adapted(tokenizer: Tokenizer, num_tokens: int, mask_id: int | None = None) -> Tokenizer:
    """The tokenizer as a model of N tokens needs it.

    Raises:
        DataError: it is not that model's.
    """
    has_mask = mask_id is not None and tokenizer.vocab_size == num_tokens + 1
    unused = num_tokens - tokenizer.vocab_size
    if has_mask:
        return AdaptedTokenizer(tokenizer, num_tokens, mask_id)
    if 0 < unused <= MOST_UNUSED and tokenizer.vocab_size > MOST_UNUSED:
        return AdaptedTokenizer(tokenizer, num_tokens)
    if unused:
        raise DataError(
            f"the {tokenizer.kind} tokenizer has {tokenizer.vocab_size} tokens and the checkpoint "
            f"{num_tokens}: use the tokenizer it was trained with"
        )
    return tokenizer
