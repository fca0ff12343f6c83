"""What every tokenizer does: text to token ids and back, and the files that define it.

Every tokenizer has N real tokens, ids 0..N-1, of which one (`eos_id`) separates documents. The mask
state of an absorbing graph is not one of them: it belongs to the graph.
"""

import hashlib
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from sedd_scale.arrays import IntArray
from sedd_scale.errors import DataError
from sedd_scale.files.atomic import write_atomically

# Of a dataset or a checkpoint, what holds its tokenizer.
TOKENIZER_DIRECTORY = "tokenizer"
TOKENIZER_FILE = "tokenizer.json"
FORMAT_VERSION = 1
RESPELLED = "documents that the tokenizer spells otherwise; bits per character are of its spelling"
MUCH_UNKNOWN = 0.01


class Tokenizer(ABC):
    """A reversible map between text and ids 0..N-1.

    Attributes:
        kind: its name in `opening.TOKENIZERS`.
        about: what else reads its files, or what the ids are, for a model card.
        file_names: of the files that define it; optional_files: of those that may be there too.
        found_in: what holds them, in words; trained: whether it can be made of text instead.
        vocab_size: N, the number of real tokens.
        eos_id: the id written after every document.
        unknown_id: the id that stands for text the vocabulary cannot spell, or None.
        eos_in_text: whether EOS also occurs inside documents, so that it marks no boundary.
        threads: how many threads `encode_batch` may use, where its library has threads.
    """

    kind: ClassVar[str]
    about: ClassVar[str]
    file_names: ClassVar[tuple[str, ...]] = ()
    optional_files: ClassVar[tuple[str, ...]] = ()
    found_in: ClassVar[str] = "no files at all"
    trained: ClassVar[bool] = False
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

    def files(self) -> dict[str, bytes]:
        """The files that define this tokenizer: name -> content."""
        return {}

    @classmethod
    def of_files(cls, files: Mapping[str, bytes], name: str = "") -> "Tokenizer":
        """The tokenizer that `files` describes; `name` is what errors call it."""
        given = [files[own] for own in cls.file_names]
        return cls(*given, **({"name": name} if given and name else {}))

    @classmethod
    def files_at(cls, path: Path) -> dict[str, bytes] | None:
        """The files of one at a path that a user gives; None: there is none of this kind.

        Raises:
            DataError: a part of them is missing.
        """
        return None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer of this kind at a path; DataError where there is none."""
        if not Path(path).exists():
            raise DataError(f"{path} does not exist: give {cls.found_in}")
        files = cls.files_at(Path(path))
        if files is None:
            raise DataError(f"{path} holds no {cls.kind} tokenizer: give {cls.found_in}")
        return cls.of_files(files, str(path))

    def normalize(self, text: str) -> str:
        """The text as the ids spell it; text8 and most SentencePiece models change some texts."""
        return text

    def spellings(self, texts: Sequence[str], ids: Sequence[IntArray]) -> list[str]:
        """`normalize` of each text, whose ids are known."""
        return [self.normalize(text) for text in texts]

    def _encode_part(self, text: str, *, begins: bool) -> IntArray:
        """Ids that spell a text within others letter for letter, where there are such."""
        return self.encode(text)

    def _decode_part(self, ids: list[int], *, begins: bool) -> str:
        """What ids spell within others."""
        return self._decode(ids)

    def encode_part(self, text: str, *, begins: bool) -> IntArray:
        """The ids of a text that stands within others, to be spelled letter for letter; int64.

        Args:
            begins: whether nothing is before it.

        Raises:
            DataError: the vocabulary has no token for a character, or the tokenizer changes one.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text holds half of a surrogate pair at character {error.start}: mend it"
            ) from error
        ids = self._encode_part(text, begins=begins)
        if self.unknown_id is not None and self.unknown_id in ids:
            for character in dict.fromkeys(text):
                if self.unknown_id in self._encode_part(character, begins=False):
                    raise DataError(
                        f"the text holds {character!r}, for which the tokenizer has no token: "
                        "leave it out"
                    )
        spelled = self._decode_part(ids.tolist(), begins=begins)
        if spelled != text:
            at = next((k for k, (a, b) in enumerate(zip(text, spelled)) if a != b), len(spelled))
            near = slice(max(0, at - 10), at + 10)
            raise DataError(
                f"the {self.kind} tokenizer spells {text[near]!r} as {spelled[near]!r}, so that "
                "what is given would not stay: give text that it spells as it is"
            )
        return ids

    def encode(self, text: str) -> IntArray:
        """The ids of one text, without EOS; int64 [tokens]."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence of ids.

        EOS becomes its own piece in gpt2 and hf (as "<|endoftext|>"), a space in text8, and nothing
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
        return self._fingerprint_of(self.files())

    def _fingerprint_of(self, parts: Mapping[str, bytes]) -> str:
        digest = hashlib.sha256(self.kind.encode())
        for name, content in sorted(parts.items()):
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


def warn_of_unknown(share: float, what: str) -> None:
    """Say on stderr where more than `MUCH_UNKNOWN` of a text's tokens are unknown ones."""
    if share > MUCH_UNKNOWN:
        print(
            f"warning: {share:.1%} of the tokens of {what} are unknown ones, which stand for text "
            "that the tokenizer cannot spell: take a tokenizer made for such text, or with bytes "
            "to fall back on",
            file=sys.stderr,
        )


def read_tokenizer_file(path: Path) -> bytes:
    """The bytes of a file; DataError where it is missing."""
    if not path.is_file():
        raise DataError(f"tokenizer file {path} does not exist: give the path of an existing one")
    return path.read_bytes()
