"""Training a SentencePiece model that loses nothing of the text."""

import io
import re
from collections.abc import Iterable, Iterator

from sedd_scale.errors import DataError
from sedd_scale.tokenizers.sentencepiece import SentencePieceTokenizer

# SentencePiece skips longer training sentences, so long lines are cut here.
TRAINING_LINE_CHARACTERS = 1000
SMALLEST_SENTENCEPIECE_VOCABULARY = 300


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Train a SentencePiece unigram model of exactly `vocab_size` pieces.

    The model loses nothing: no Unicode normalisation, whitespace kept, a newline is one piece,
    and characters it does not know spelled as bytes. (One exception is SentencePiece's own: U+2581,
    its mark for a space, comes back as a space.) Training is single-threaded, so equal texts give
    an equal model, byte for byte. Piece 0 is unknown, piece 1 is EOS.

    Raises:
        DataError: `vocab_size` is too small for bytes and characters, or too large for the text.
    """
    import sentencepiece

    if vocab_size < SMALLEST_SENTENCEPIECE_VOCABULARY:
        raise DataError(
            f"--vocab-size {vocab_size} leaves no room beside the 256 byte pieces: give at least "
            f"{SMALLEST_SENTENCEPIECE_VOCABULARY}, or use --tokenizer bytes"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        message = str(error)
        too_high = re.search(r"too high \(\d+\).*<= (\d+)", message, re.DOTALL)
        if too_high is not None:
            raise DataError(
                f"--vocab-size {vocab_size} is too large for this text: give at most "
                f"{too_high.group(1)}, or more text"
            ) from error
        too_small = re.search(r"required_chars. \d+ vs (\d+)", message)
        if too_small is not None:
            raise DataError(
                f"--vocab-size {vocab_size} is too small for this text's characters: give more "
                f"than {too_small.group(1)}"
            ) from error
        raise DataError(
            f"sentencepiece cannot learn {vocab_size} pieces from this text ({message}): give "
            "another --vocab-size or more text"
        ) from error
    return SentencePieceTokenizer(model.getvalue())


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Non-empty lines of at most TRAINING_LINE_CHARACTERS; NUL would end a sentence early."""
    for text in texts:
        for line in text.replace("\0", "").split("\n"):
            for start in range(0, len(line), TRAINING_LINE_CHARACTERS):
                yield line[start : start + TRAINING_LINE_CHARACTERS]
