"""A tokenizer for a model that has a few ids more, which no text has: such as Duo's [PAD]."""

from collections.abc import Sequence

from sedd_scale.arrays import IntArray
from sedd_scale.errors import DataError
from sedd_scale.tokenizers.base import Tokenizer

# More than that is another tokenizer: small vocabularies are rounded up to multiples of 128 at
# most, and large ones (Qwen's) have a few hundred embeddings that no token has.
MOST_UNUSED = 127
MOST_UNUSED_SHARE = 1 / 200


class AdaptedTokenizer(Tokenizer):
    """Another tokenizer, whose fingerprint it has, with N of a model."""

    def __init__(self, inner: Tokenizer, num_tokens: int) -> None:
        self._inner = inner
        self.kind = inner.kind  # type: ignore[misc]
        self.eos_in_text = inner.eos_in_text  # type: ignore[misc]
        self.eos_id, self.unknown_id = inner.eos_id, inner.unknown_id
        self.vocab_size = num_tokens

    def encode_batch(self, texts: Sequence[str]) -> list[IntArray]:
        """The ids of each text."""
        return self._inner.encode_batch(texts)

    def _decode(self, ids: list[int]) -> str:
        return self._inner.decode(token for token in ids if token < self._inner.vocab_size)

    def normalize(self, text: str) -> str:
        """As the tokenizer does."""
        return self._inner.normalize(text)

    def files(self) -> dict[str, bytes]:
        """Those of the tokenizer."""
        return self._inner.files()

    @property
    def fingerprint(self) -> str:
        """That of the tokenizer."""
        return self._inner.fingerprint


def adapted(tokenizer: Tokenizer, num_tokens: int) -> Tokenizer:
    """The tokenizer as a model of N tokens needs it.

    Raises:
        DataError: it is not that model's.
    """
    if tokenizer.vocab_size == num_tokens:
        return tokenizer
    if not fits(tokenizer.vocab_size, num_tokens):
        raise DataError(
            f"the {tokenizer.kind} tokenizer has {tokenizer.vocab_size} tokens and the checkpoint "
            f"{num_tokens}: use the tokenizer it was trained with"
        )
    return AdaptedTokenizer(tokenizer, num_tokens)


def fits(vocab_size: int, num_tokens: int) -> bool:
    """Whether a model of N tokens may have a tokenizer of that many: all but a few."""
    most = max(MOST_UNUSED, num_tokens * MOST_UNUSED_SHARE) if vocab_size > MOST_UNUSED else 0
    return 0 <= num_tokens - vocab_size <= most
