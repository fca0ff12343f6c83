"""Which documents train, validate and test: decided by a document's own text, not by its place."""

import hashlib
from collections.abc import Iterable

from sedd_scale.errors import DataError
from sedd_scale.preparation.documents import Document


def document_hash(text: str) -> bytes:
    """SHA-256 of a document's UTF-8; equal documents are always in the same split."""
    return hashlib.sha256(text.encode()).digest()


def is_empty(document: Document) -> bool:
    """Whether a document has nothing but whitespace; such documents are left out."""
    return not document.text.strip()


class SplitRule:
    """Names the split of a document by its hash.

    The first 64 bits of the hash, as a fraction u of their range: u < valid_fraction validates, the
    next test_fraction tests, the rest trains. A document so keeps its split when others are added.

    Attributes:
        names: the splits that must not be empty, "train" first.
    """

    def __init__(self, valid_fraction: float, test_fraction: float) -> None:
        assert valid_fraction >= 0 and test_fraction >= 0 and valid_fraction + test_fraction < 1
        self._valid_end = valid_fraction
        self._test_end = valid_fraction + test_fraction
        self._assigned: dict[bytes, str] = {}
        self._fraction = {"valid": valid_fraction, "test": test_fraction}
        held_out = [name for name, fraction in self._fraction.items() if fraction > 0]
        self.names = ["train", *held_out]

    def split_of(self, digest: bytes) -> str:
        """The split of the document with this hash."""
        if self._assigned:
            return self._assigned[digest]
        fraction = int.from_bytes(digest[:8], "big") / 2**64
        if fraction < self._valid_end:
            return "valid"
        return "test" if fraction < self._test_end else "train"

    def fit(self, documents: Iterable[Document]) -> None:
        """Make sure that no split is empty, reading only as many documents as that takes.

        Where the hashes leave a split empty, as among a handful of documents, they are ranked
        instead: the smallest hashes validate, at least one document, the next ones test, and the
        rest trains.

        Raises:
            DataError: there is no text, or fewer distinct documents than splits.
        """
        seen: set[bytes] = set()
        found: set[str] = set()
        for document in documents:
            if is_empty(document):
                continue
            digest = document_hash(document.text)
            seen.add(digest)
            found.add(self.split_of(digest))
            if len(found) == len(self.names):
                return
        if not seen:
            raise DataError("the input holds no text: give files with text")
        if len(seen) < len(self.names):
            raise DataError(
                f"{len(seen)} distinct document(s) are too few for the splits "
                f"{', '.join(self.names)}: give more documents or --valid-fraction 0"
            )
        ranked = sorted(seen)
        begin = 0
        for name in self.names[1:]:
            # Leave a document for every split still to come, and for train.
            left = len(self.names) - 1 - self.names.index(name)
            count = max(1, round(self._fraction[name] * len(ranked)))
            end = min(begin + count, len(ranked) - left - 1)
            self._assigned |= dict.fromkeys(ranked[begin:end], name)
            begin = end
        self._assigned |= dict.fromkeys(ranked[begin:], "train")
