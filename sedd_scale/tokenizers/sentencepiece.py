"""SentencePiece models as tokenizers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sedd_scale.arrays import IntArray
from sedd_scale.errors import DataError
from sedd_scale.tokenizers.base import Tokenizer, read_tokenizer_file

# Of text that SentencePiece is given at a time; a merge takes longer in a long text.
BPE_CHUNK_CHARACTERS = 2000
SPACE_PIECE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
# Behind a serialised model these bytes set fields of its normalizer_spec (protocol buffers merge
# what follows): remove_extra_whitespaces = false, and add_dummy_prefix = false too.
_ALL_SPACES = b"\x1a\x02\x20\x00"
_NO_PREFIX = b"\x1a\x04\x18\x00\x20\x00"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; EOS is the model's own end-of-sentence piece.

    Args:
        model: the bytes of a `.model` file.
        name: what errors call it.

    Raises:
        DataError: the bytes are no SentencePiece model, or the model has no EOS piece.
    """

    kind = "sentencepiece"
    about = "`SentencePieceProcessor(model_file=...)` reads `sentencepiece.model` there."
    MODEL_FILE = "sentencepiece.model"
    file_names = (MODEL_FILE,)
    found_in = "a sentencepiece .model file, or a directory with only one"
    trained = True

    def __init__(self, model: bytes, *, name: str = "the SentencePiece model") -> None:
        try:
            self._processor = _processor(model)
        except RuntimeError as error:
            raise DataError(
                f"{name} is not a SentencePiece model, or is cut short: give a .model file that "
                "sentencepiece wrote"
            ) from error
        self._model = model
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise DataError(
                f"{name} has no end-of-sentence piece to separate documents with: train it with "
                "--eos_id set"
            )
        self.unknown_id = self._processor.unk_id()
        self._in_chunks = _merges_within_words(model)
        # One that removes no spaces, and one that adds none either: what is given and drawn within
        # a text is spelled as it stands.
        self._begin, self._within = _processor(model + _ALL_SPACES), _processor(model + _NO_PREFIX)
        # Where the model adds a space of its own that decoding takes away.
        probe = self._processor.normalize("a")
        self._added = slice(
            int(probe.startswith(SPACE_PIECE)), -1 if probe.endswith(SPACE_PIECE) else None
        )

    def encode_batch(self, texts: Sequence[str]) -> list[IntArray]:
        if self._in_chunks:
            parts = self._processor.parallel_encode(
                list(texts),
                chunk_len=BPE_CHUNK_CHARACTERS,
                num_threads=self.threads,
                return_type="numpy",
            )
        else:
            parts = self._processor.encode(
                list(texts), num_threads=self.threads, return_type="numpy"
            )
        return [ids.astype(np.int64) for ids in parts]

    def normalize(self, text: str) -> str:
        return str(self._processor.normalize(text)).replace(SPACE_PIECE, " ")[self._added]

    def _encode_part(self, text: str, *, begins: bool) -> IntArray:
        takes_space = begins and self._added.start == 1
        ids = (self._begin if takes_space else self._within).encode(text, return_type="numpy")
        return np.asarray(ids, dtype=np.int64)

    def _decode(self, ids: list[int]) -> str:
        return str(self._begin.decode(ids))

    def _decode_part(self, ids: list[int], *, begins: bool) -> str:
        return str((self._begin if begins else self._within).decode(ids))

    def files(self) -> dict[str, bytes]:
        return {self.MODEL_FILE: self._model}

    @classmethod
    def files_at(cls, path: Path) -> dict[str, bytes] | None:
        """Of a .model file, or of a directory that holds exactly one."""
        models = sorted(path.glob("*.model")) if path.is_dir() else [path]
        if len(models) != 1 or models[0].suffix != ".model":
            return None
        return {cls.MODEL_FILE: read_tokenizer_file(models[0])}


def _processor(model: bytes) -> Any:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


def _merges_within_words(model: bytes) -> bool:
    """Whether the text between two spaces has the same ids whatever stands around it.

    So it is with byte pair encoding, none of whose pieces continues behind a space. Unigram models
    sum up scores over the whole text, and where two spellings score alike, rounding decides.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:  # no protobuf; encoding whole texts gives the same ids more slowly
        return False
    described: Any = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    trainer, normal = described.trainer_spec, described.pieces[0].NORMAL
    return bool(trainer.model_type == trainer.BPE) and not any(
        SPACE_PIECE in piece.piece.lstrip(SPACE_PIECE)
        for piece in described.pieces
        if piece.type == normal
    )
