"""Text to token ids and back: SentencePiece, GPT-2 byte-level BPE, bytes and the text8 alphabet.

Every tokenizer has N real tokens, ids 0..N-1, of which one (`eos_id`) separates documents. The mask
state of an absorbing graph is not one of them: it belongs to the graph.
"""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from sedd_scale.data.atomic import write_atomically
from sedd_scale.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
FORMAT_VERSION = 1
# Of text that SentencePiece is given at a time; a merge takes longer in a long text.
BPE_CHUNK_CHARACTERS = 2000
SPACE_PIECE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
KINDS = ("sentencepiece", "gpt2", "bytes", "text8")

IntArray = npt.NDArray[np.int64]


class Tokenizer(ABC):
    """A reversible map between text and ids 0..N-1.

    Attributes:
        kind: one of `KINDS`.
        vocab_size: N, the number of real tokens.
        eos_id: the id written after every document.
        unknown_id: the id that stands for text the vocabulary cannot spell, or None.
        eos_in_text: whether EOS also occurs inside documents, so that it marks no boundary.
        threads: how many threads `encode_batch` may use, where its library has threads.
    """

    kind: ClassVar[str]
    vocab_size: int
    eos_id: int
    unknown_id: int | None = None
    eos_in_text: ClassVar[bool] = False
    threads: int = 1

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[IntArray]:
        """The ids of each text, without EOS; one int64 array [tokens] per text."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of ids that are known to lie in 0..N-1."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """The files that define this tokenizer: name -> content."""

    def normalize(self, text: str) -> str:
        """The text whose characters the ids spell; only text8 changes it."""
        return text

    def encode(self, text: str) -> IntArray:
        """The ids of one text, without EOS; int64 [tokens]."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence of ids.

        EOS becomes its own piece in gpt2 ("<|endoftext|>"), a space in text8, and nothing
        elsewhere. Bytes that are no UTF-8 become U+FFFD.

        Raises:
            DataError: an id is outside 0..N-1, such as a mask state that was never unmasked.
        """
        known = [int(token) for token in ids]
        for token in known:
            if not 0 <= token < self.vocab_size:
                raise DataError(
                    f"token id {token} is outside 0..{self.vocab_size - 1} of the {self.kind} "
                    "tokenizer: replace mask states before decoding, or use the tokenizer that "
                    "made these ids"
                )
        return self._decode(known)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the kind and of every defining file."""
        digest = hashlib.sha256(self.kind.encode())
        for name, content in sorted(self.files().items()):
            digest.update(f"\0{name}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the defining files into `directory`, and tokenizer.json last."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            write_atomically(target / name, content)
        description = {
            "version": FORMAT_VERSION,
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "fingerprint": self.fingerprint,
            "files": sorted(self.files()),
        }
        text = json.dumps(description, indent=2) + "\n"
        write_atomically(target / TOKENIZER_FILE, text.encode())


class BytesTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255 and EOS as 256: N = 257."""

    kind = "bytes"
    vocab_size = 257
    eos_id = 256

    def encode_batch(self, texts: Sequence[str]) -> list[IntArray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return bytes(token for token in ids if token != self.eos_id).decode(errors="replace")

    def files(self) -> dict[str, bytes]:
        return {}


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SPELL_DIGITS = {ord(str(digit)): f" {name} " for digit, name in enumerate(_DIGITS)}
_NOT_LETTERS = re.compile(r"[^a-z]+")


class Text8Tokenizer(Tokenizer):
    """The 27 symbols of text8: space is 0, a..z are 1..26; N = 27.

    Text is normalised as Mahoney's text8 was: lower case, each digit spelled out as a word, every
    other character a space, runs of spaces one space. The space also separates documents.
    """

    kind = "text8"
    vocab_size = 27
    eos_id = 0
    eos_in_text = True

    _ALPHABET = " abcdefghijklmnopqrstuvwxyz"

    def normalize(self, text: str) -> str:
        return _NOT_LETTERS.sub(" ", text.lower().translate(_SPELL_DIGITS)).strip(" ")

    def encode_batch(self, texts: Sequence[str]) -> list[IntArray]:
        ids = []
        for text in texts:
            letters = np.frombuffer(self.normalize(text).encode("ascii"), dtype=np.uint8)
            ids.append(np.where(letters == ord(" "), 0, letters - np.uint8(96)).astype(np.int64))
        return ids

    def _decode(self, ids: list[int]) -> str:
        return "".join(self._ALPHABET[token] for token in ids)

    def files(self) -> dict[str, bytes]:
        return {}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; EOS is the model's own end-of-sentence piece.

    Args:
        model: the bytes of a `.model` file.
        name: what errors call it.

    Raises:
        DataError: the bytes are no SentencePiece model, or the model has no EOS piece.
    """

    kind = "sentencepiece"
    MODEL_FILE = "sentencepiece.model"

    def __init__(self, model: bytes, *, name: str = "the SentencePiece model") -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
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

    def _decode(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids))

    def files(self) -> dict[str, bytes]:
        return {self.MODEL_FILE: self._model}


def _merges_within_words(model: bytes) -> bool:
    """Whether the text between two spaces has the same ids whatever stands around it.

    So it is with byte pair encoding, none of whose pieces goes on behind a space. Unigram models
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


def open_sentencepiece(path: str | os.PathLike[str]) -> SentencePieceTokenizer:
    """The SentencePiece tokenizer of a `.model` file, or of a directory that holds exactly one."""
    given = Path(path)
    if given.is_dir():
        models = sorted(given.glob("*.model"))
        if len(models) != 1:
            raise DataError(f"{given} holds {len(models)} .model files: name the one to use")
        given = models[0]
    return SentencePieceTokenizer(read_tokenizer_file(given), name=str(given))


def tokenizer_of_files(kind: str, files: dict[str, bytes]) -> Tokenizer:
    """The tokenizer that `Tokenizer.files` describes; `kind` is one of `KINDS`."""
    if kind == "sentencepiece":
        return SentencePieceTokenizer(files[SentencePieceTokenizer.MODEL_FILE])
    if kind == "gpt2":
        from sedd_scale.data.gpt2_tokenizer import GPT2Tokenizer

        return GPT2Tokenizer(files[GPT2Tokenizer.VOCABULARY_FILE], files[GPT2Tokenizer.MERGES_FILE])
    return BytesTokenizer() if kind == "bytes" else Text8Tokenizer()


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `directory`.

    Raises:
        DataError: the directory holds none, a file is missing, or its files were changed since.
    """
    from sedd_scale.data.gpt2_tokenizer import open_gpt2

    source = Path(directory)
    path = source / TOKENIZER_FILE
    if not path.is_file():
        raise DataError(
            f"{source} holds no {TOKENIZER_FILE}: give a directory that prepare_data made"
        )
    try:
        description: Any = json.loads(read_tokenizer_file(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): prepare the data again") from error
    kind = description.get("kind") if isinstance(description, dict) else None
    makers: dict[str, Callable[[], Tokenizer]] = {
        "sentencepiece": lambda: open_sentencepiece(source / SentencePieceTokenizer.MODEL_FILE),
        "gpt2": lambda: open_gpt2(source),
        "bytes": BytesTokenizer,
        "text8": Text8Tokenizer,
    }
    if kind not in makers or description["version"] != FORMAT_VERSION:
        raise DataError(
            f"{path} describes no tokenizer that this program reads ({', '.join(KINDS)}, version "
            f"{FORMAT_VERSION}): prepare the data again"
        )
    tokenizer = makers[kind]()
    if tokenizer.fingerprint != description.get("fingerprint"):
        raise DataError(
            f"the tokenizer files in {source} are not the ones that were saved (their fingerprint "
            "differs): restore them or prepare the data again"
        )
    return tokenizer


def available_cores() -> int:
    """The number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_tokenizer_file(path: Path) -> bytes:
    """The bytes of a file; DataError where it is missing."""
    if not path.is_file():
        raise DataError(f"tokenizer file {path} does not exist: give the path of an existing one")
    return path.read_bytes()
