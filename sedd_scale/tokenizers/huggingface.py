"""Tokenizers of Hugging Face: a tokenizer.json, and what stands beside it."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sedd_scale.arrays import IntArray
from sedd_scale.errors import DataError
from sedd_scale.tokenizers.base import TOKENIZER_FILE, Tokenizer, read_tokenizer_file

# Settings by which a tokenizer adds a space to a text, or takes one away again; where a text
# stands within others they are these.
_WITHIN: dict[str, dict[str, Any]] = {
    "Metaspace": {"prepend_scheme": "never", "add_prefix_space": False},
    "ByteLevel": {"add_prefix_space": False},
    "Strip": {"start": 0, "stop": 0},
    "Prepend": {"prepend": ""},
}
# No text holds these characters, so that none is spelled with a piece that has them.
_NO_TEXT = "\ufdd0{}\ufdd1"


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library; EOS is the one its configuration names.

    Text that reads like a special token is ordinary text. Nothing is added to a text, cut off or
    padded. What stands beside tokenizer.json is kept as it is, chat template included.

    Args:
        files: by name; `MODEL_FILE`, and what there is of `optional_files`.
        name: what errors call it.

    Raises:
        DataError: the files define no tokenizer, none of them names EOS, or the library is missing.
    """

    kind = "hf"
    about = "`Tokenizer.from_file` of tokenizers reads `hf_tokenizer.json` there."
    MODEL_FILE = "hf_tokenizer.json"  # TOKENIZER_FILE is taken in a folder of `save`
    file_names = (MODEL_FILE,)
    optional_files = (
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
    )
    found_in = "a Hugging Face tokenizer.json, or its directory"

    def __init__(self, files: Mapping[str, bytes], *, name: str = MODEL_FILE) -> None:
        self._files, self._name = dict(files), name
        self._described = self._json(self.MODEL_FILE)
        self._plain = self._made(self._described)
        ids = self._plain.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(ids.values(), default=-1)
        self.eos_id = self._find_eos()
        added = self._plain.get_added_tokens_decoder()
        if self.eos_id not in added:
            raise DataError(
                f"EOS of {name} is {self._plain.id_to_token(self.eos_id)!r}, which texts may hold: "
                "set eos_token in tokenizer_config.json to a special token"
            )
        self._specials = {
            token.content
            for number, token in added.items()
            if token.special or number == self.eos_id
        }
        self._without_specials = self._encoder(self._described, self._plain)
        model = self._described["model"]
        of_bytes = _of_bytes(self._described)
        self._spells_all = of_bytes and _changes_nothing(self._described)
        self._byte_of = {
            ids[piece]: byte
            for byte in range(256 if model.get("byte_fallback") else 0)
            if (piece := f"<0x{byte:02X}>") in ids
        }
        unknown = model.get("unk_token")
        self.unknown_id = ids.get(unknown, model.get("unk_id"))
        if of_bytes or len(self._byte_of) == 256:
            self.unknown_id = None
        if self.unknown_id == self.eos_id:
            raise DataError(
                f"{name} writes {unknown!r} both for text that it cannot spell and behind every "
                "document: give a tokenizer with an EOS of its own"
            )

    @classmethod
    def of_files(cls, files: Mapping[str, bytes], name: str = "") -> "HuggingFaceTokenizer":
        """The tokenizer that `files` describes."""
        return cls(files, **({"name": name} if name else {}))

    @classmethod
    def files_at(cls, path: Path) -> dict[str, bytes] | None:
        """Of a directory or a tokenizer.json, but not of a description that `save` wrote.

        config.json and generation_config.json are taken where no other file names EOS.
        """
        if path.is_dir():
            names = (cls.MODEL_FILE, TOKENIZER_FILE)
            path = next((path / name for name in names if (path / name).is_file()), path)
        if path.suffix != ".json" or not path.is_file():
            return None
        content = path.read_bytes()
        if not isinstance(_parsed(content, path).get("model"), dict):
            return None
        files = {cls.MODEL_FILE: content}
        for name in cls.optional_files:
            beside = path.with_name(name)
            if beside.is_file() and not (_names_eos(files) and name.endswith("config.json")):
                files[name] = read_tokenizer_file(beside)
        return files

    def encode_batch(self, texts: Sequence[str]) -> list[IntArray]:
        return self._encode_batch(self._without_specials, texts)

    def normalize(self, text: str) -> str:
        return self.spellings([text], self.encode_batch([text]) if not self._spells_all else [])[0]

    def spellings(self, texts: Sequence[str], ids: Sequence[IntArray]) -> list[str]:
        if self._spells_all:
            change = self._plain.normalizer
            return [text if change is None else change.normalize_str(text) for text in texts]
        return [self._spelled(self._plain, part.tolist()) for part in ids]

    def _encode_part(self, text: str, *, begins: bool) -> IntArray:
        made = self._without_specials if begins else self._within[0]
        return self._encode_batch(made, [text])[0]

    def _decode(self, ids: list[int]) -> str:
        return self._spelled(self._plain, ids)

    def _decode_part(self, ids: list[int], *, begins: bool) -> str:
        return self._spelled(self._plain if begins else self._within[1], ids)

    def files(self) -> dict[str, bytes]:
        return dict(self._files)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the kind, of tokenizer.json and of EOS: all that ids depend on."""
        return self._fingerprint_of(
            {self.MODEL_FILE: self._files[self.MODEL_FILE], "EOS": str(self.eos_id).encode()}
        )

    def _encode_batch(self, made: Any, texts: Sequence[str]) -> list[IntArray]:
        # The library looks at each call.
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if self.threads > 1 else "false"
        try:
            encoded = made.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises no class of its own
            raise DataError(f"{self._name} cannot encode a text: {_reason(error)}") from error
        return [np.array(one.ids, dtype=np.int64) for one in encoded]

    def _spelled(self, made: Any, ids: list[int]) -> str:
        text = str(made.decode(ids, skip_special_tokens=False))
        if not self._byte_of or "\ufffd" not in text:
            return text
        # The library gives up all bytes of a run for one that is no UTF-8; one piece is made of
        # each run instead.
        pieces: list[str] = []
        run = bytearray()
        for token in [*ids, -1]:
            if token in self._byte_of:
                run.append(self._byte_of[token])
                continue
            if run:
                pieces.append(run.decode(errors="replace"))
                run.clear()
            piece = made.id_to_token(token) if token >= 0 else None
            pieces += [] if piece is None else [piece]
        return str(made.decoder.decode(pieces)) if made.decoder else " ".join(pieces)

    @functools.cached_property
    def _within(self) -> tuple[Any, Any]:
        """What encodes and what decodes a text that stands within others."""
        described = _with_settings(self._described, _WITHIN)
        made = self._made(described)
        return self._encoder(described, made), made

    def _encoder(self, described: dict[str, Any], made: Any) -> Any:
        """`made` of a description, or another one, by which no text becomes a special token."""
        spelled = made.encode_batch(sorted(self._specials), add_special_tokens=False)
        caught = {made.id_to_token(token) for one in spelled for token in one.ids} & self._specials
        return self._made(_renamed(described, caught)) if caught else made

    def _made(self, described: dict[str, Any]) -> Any:
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(
                f"{self._name} needs the package tokenizers: pip install 'sedd_scale[hf]'"
            ) from error
        try:
            made = tokenizers.Tokenizer.from_str(json.dumps(described))
        except Exception as error:  # the library raises no class of its own
            raise DataError(
                f"{self._name} is no tokenizer that the tokenizers library reads "
                f"({_reason(error)}): give a tokenizer.json that it wrote"
            ) from error
        made.no_truncation()
        made.no_padding()
        made.encode_special_tokens = True
        if getattr(made.model, "dropout", None):
            made.model.dropout = None  # of its training; ids are a function of the text
        return made

    def _json(self, name: str) -> dict[str, Any]:
        return _parsed(self._files[name], name if name in self.optional_files else self._name)

    def _find_eos(self) -> int:
        for name, key in _EOS_KEYS:
            given = self._json(name).get(key) if name in self._files else None
            if isinstance(given, dict):
                given = given.get("content")
            if isinstance(given, list):
                given = next(iter(given), None)
            if given is None:
                continue
            token = self._plain.token_to_id(given) if isinstance(given, str) else given
            if not isinstance(token, int) or self._plain.id_to_token(token) is None:
                raise DataError(
                    f"{self._name} has no token {given!r}, which {name} names as {key}: give files "
                    "that belong together"
                )
            return token
        raise DataError(
            f"{self._name} names no EOS to separate documents with: set eos_token in "
            "tokenizer_config.json beside it"
        )


_EOS_KEYS = (
    ("tokenizer_config.json", "eos_token"),
    ("special_tokens_map.json", "eos_token"),
    ("config.json", "eos_token_id"),
    ("generation_config.json", "eos_token_id"),
)


def _names_eos(files: Mapping[str, bytes]) -> bool:
    return any(
        name in files and _parsed(files[name], name).get(key) not in (None, [])
        for name, key in _EOS_KEYS
    )


def _parsed(content: bytes, name: object) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise DataError(f"{name} is not JSON ({error}): restore it") from error
    return parsed if isinstance(parsed, dict) else {}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _parts(described: Any) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder, and those that it is a sequence of."""
    if not isinstance(described, dict):
        return []
    inner = next((v for k, v in described.items() if k.endswith("s") and isinstance(v, list)), [])
    return [described, *(part for one in inner for part in _parts(one))]


def _of_bytes(described: dict[str, Any]) -> bool:
    """Whether there are pieces for all bytes, as of GPT-2, so that no text is unknown."""
    from tokenizers import pre_tokenizers

    model, cuts = described["model"], _parts(described.get("pre_tokenizer"))
    return (
        model.get("type", "BPE") == "BPE"
        and any(part.get("type") == "ByteLevel" for part in cuts)
        and {*pre_tokenizers.ByteLevel.alphabet()} <= {*model.get("vocab", {})}
    )


def _changes_nothing(described: dict[str, Any]) -> bool:
    """Whether ids of bytes spell every text as the normalizer leaves it."""
    model, cuts = described["model"], _parts(described.get("pre_tokenizer"))
    decoders = [part.get("type") for part in _parts(described.get("decoder"))]
    return (
        {part.get("type") for part in cuts} <= {"Sequence", "ByteLevel", "Split", "Digits"}
        and not any(
            part.get("behavior") == "Removed"
            or (part.get("type") == "ByteLevel" and part.get("add_prefix_space"))
            for part in cuts
        )
        and decoders in (["ByteLevel"], ["Sequence", "ByteLevel"])
        and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
        and not any(
            token.get("lstrip") or token.get("rstrip") or token.get("normalized")
            for token in described.get("added_tokens") or []
            if not token.get("special")
        )
    )


def _with_settings(described: Any, settings: Mapping[str, Mapping[str, Any]]) -> Any:
    """A description in which the parts of some types are set otherwise, where they are set."""
    if isinstance(described, list):
        return [_with_settings(one, settings) for one in described]
    if not isinstance(described, dict):
        return described
    kept = {
        key: value if key in ("model", "added_tokens") else _with_settings(value, settings)
        for key, value in described.items()
    }
    changed = settings.get(str(described.get("type")), {})
    return kept | {key: value for key, value in changed.items() if key in kept}


def _renamed(described: dict[str, Any], pieces: set[str]) -> dict[str, Any]:
    """A description in which these pieces are spelled as no text is; ids stay."""

    def name(piece: str) -> str:
        return _NO_TEXT.format(piece) if piece in pieces else piece

    model = dict(described["model"])
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {name(piece): token for piece, token in vocabulary.items()}
    elif vocabulary is not None:
        model["vocab"] = [[name(piece), *rest] for piece, *rest in vocabulary]
    if model.get("unk_token") is not None:
        model["unk_token"] = name(model["unk_token"])
    added = [{**one, "content": name(one["content"])} for one in described.get("added_tokens", [])]
    return {**described, "model": model, "added_tokens": added}
