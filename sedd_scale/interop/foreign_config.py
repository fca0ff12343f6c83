"""What the configuration beside a checkpoint of another program says, as keys of ours.

Read are config.json of a published MDLM, Duo or UDLM, and what SEDD's, MDLM's and Duo's training
code keeps: `.hydra/config.yaml` above the checkpoint, or the configuration within a Lightning file.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sedd_scale.config import Config
from sedd_scale.diffusion.objectives import D3PMAbsorb, MaskedCrossEntropy, ScoreEntropy
from sedd_scale.errors import CheckpointError
from sedd_scale.interop.assumptions import KEYS, Assumptions, text_of
from sedd_scale.interop.foreign_files import CONFIG_FILE, read_json
from sedd_scale.interop.pickled_files import plain

# Networks under the same names that compute something else.
_OTHER_NETWORKS = {
    "cross_attn": "whose blocks attend to a clean copy of the text before them",
    "causal": "which attends to the left alone",
    "causal_attention": "which attends to the left alone",
}
_SCORE = {"training.objective": ScoreEntropy.name, "model.parametrisation": "score"}
SEDD: dict[str, Any] = {**_SCORE, "model.time_conditioning": True}
_DUO = {**_SCORE, "model.parametrisation": "mean", "graph.name": "uniform"}
_MDLM = {**_SCORE, "training.objective": MaskedCrossEntropy.name, "graph.name": "absorb"}
_D3PM = {**_MDLM, "training.objective": D3PMAbsorb.name}
# Programs, by a word in their model_type, architectures or algo.name; and parametrisations.
_KINDS = {"mdlm": _MDLM, "udlm": _DUO, "duo": _DUO, "sedd": _SCORE, "d3pm": _D3PM}
_PARAMETERIZATIONS = {"subs": _MDLM, "mean": _DUO, "sedd": _SCORE, "score": _SCORE, "d3pm": _D3PM}
# What the user says of the same.
_AS_MDLM, _AS_SEDD = ({"objective": kind.name} for kind in (MaskedCrossEntropy, ScoreEntropy))
_ABSORB = {"graph": "absorb"}
_AS_DUO = {"graph": "uniform", "parametrisation": "mean"}
# Ours, theirs, and the type of the value.
_VALUES: tuple[tuple[str, tuple[str, ...], type], ...] = (
    ("model.hidden_size", ("model.hidden_size", "hidden_dim"), int),
    ("model.num_layers", ("model.n_blocks", "n_blocks"), int),
    ("model.cond_dim", ("model.cond_dim", "cond_dim"), int),
    ("model.num_heads", ("model.n_heads", "n_heads"), int),
    ("model.dropout", ("model.dropout", "dropout"), float),
    ("model.scale_by_sigma", ("model.scale_by_sigma",), bool),
    ("model.time_conditioning", ("algo.time_conditioning", "time_conditioning"), bool),
    ("data.block_length", ("model.length", "model_length"), int),
    ("noise.sigma_min", ("noise.sigma_min",), float),
    ("noise.sigma_max", ("noise.sigma_max",), float),
    ("noise.eps", ("noise.eps",), float),
    ("mask_id", ("mask_token_id", "mask_index"), int),
)
_CHOICES = {
    "graph": {"absorb": "absorb", "absorbingstate": "absorb", "uniform": "uniform"},
    "noise": {name: name for name in ("loglinear", "geometric", "cosine", "linear")},
}
# What is assumed where nothing says it, and of it what only one graph has.
ASSUMED = (
    *("objective", "parametrisation", "graph", "noise", "block_length", "num_heads"),
    *("time_conditioning", "mask_id"),
)
OF_ONE = ("model.parametrisation", "mask_id")


class Said(NamedTuple):
    """A value of one of our keys, the words of the file that say it, and if it was the user."""

    value: Any
    words: str
    by_user: bool = False


NOTHING = Said(None, "")
# Vocabularies of tokenizers that have a mask of their own, by their number of states.
_OWN_MASKS = {
    35: ("text8's characters in MDLM's code", 4),
    30_522: ("BERT's uncased word pieces", 103),
    28_996: ("BERT's cased word pieces", 103),
}
# What config.json of a published SEDD has to say.
_PUBLISHED = (
    *("tokens", "graph.type", "noise.type", "model.n_heads", "model.length"),
    *("model.scale_by_sigma", "model.hidden_size", "model.n_blocks", "model.cond_dim"),
)


def known_of(path: Path, tree: Mapping[str, Any], assumptions: Assumptions) -> dict[str, Said]:
    """What the files or the user say of a checkpoint, by our keys; of `mask_id` besides.

    Args:
        path: the file of weights.
        tree: what it holds beside them.

    Raises:
        CheckpointError: it is another kind of network, one of an unknown kind, or both contradict.
    """
    found: dict[str, Said] = {}
    for file, raw in _configurations(path, tree):
        for key, said in _said(file, raw, assumptions).items():
            if found.setdefault(key, said).value != said.value:
                raise CheckpointError(
                    f"{path}: {found[key].words}, but {file} says otherwise ({said.words}): "
                    "correct or remove one of them"
                )
    for name in assumptions.given():
        key, value = KEYS[name], getattr(assumptions, name)
        if key in found and found[key].value != value:
            raise CheckpointError(
                f"{path}: {found[key].words}, not {text_of(value)}: use that, and leave "
                f"{assumptions.spelled(**{name: None})} out"
            )
        if key:
            found[key] = Said(value, assumptions.spelled(**{name: value}), by_user=True)
    for name, value in assumptions.otherwise.items():
        found.setdefault(KEYS[name], Said(value, f"{KEYS[name]}={text_of(value)}"))
    return found


def assumed(known: Mapping[str, Said], config: Config, has_heads: bool) -> dict[str, str]:
    """Field and value of what neither the files nor the user say."""
    found = {}
    for name in ASSUMED:
        key = KEYS[name]
        if known.get(key, NOTHING).words or (name == "num_heads" and has_heads):
            continue
        value = config.model.vocab_size if key == "mask_id" else config.value(key)
        if config.graph.name == ("uniform" if key == "mask_id" else "absorb") and key in OF_ONE:
            continue
        found[name] = text_of(value)
    return found


def mask_of(
    path: Path, known: Mapping[str, Said], config: Config, assumptions: Assumptions
) -> int | None:
    """The mask's id where it is not the last.

    Raises:
        CheckpointError: there is no such state, no mask at all, or a tokenizer of this size has its
            own and nothing says which it is.
    """
    said = known.get("mask_id", NOTHING)
    given: int | None = said.value
    assert config.model.vocab_size is not None
    last = config.model.vocab_size
    if not config.graph.facts.has_mask:
        if said.by_user:
            mask, graph = (assumptions.spelled(**of) for of in ({"mask_id": None}, _ABSORB))
            raise CheckpointError(f"{path}: {mask} belongs to {graph}: leave it out")
        return None
    if given is None and last + 1 in _OWN_MASKS:
        what, where = _OWN_MASKS[last + 1]
        theirs, ours = (assumptions.spelled(mask_id=mask) for mask in (where, last))
        raise CheckpointError(
            f"{path} has {last + 1} states, as many as {what}, whose mask is {where}: give "
            f"{theirs}, or {ours} if it is the last"
        )
    if given is not None and not 0 <= given <= last:
        raise CheckpointError(
            f"{path}: {said.words}, which is none of its {last + 1} states: correct it"
        )
    return None if given == last else given


def is_published(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of the published SEDD format."""
    return "tokens" in raw or all(isinstance(raw.get(key), dict) for key in ("graph", "model"))


def _configurations(
    path: Path, tree: Mapping[str, Any]
) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    if raw := read_json(path.parent / CONFIG_FILE):
        yield path.parent / CONFIG_FILE, raw
    parameters = plain(tree.get("hyper_parameters"))
    if isinstance(parameters, dict):
        inner = parameters.get("config")
        yield path, {**parameters, **inner} if isinstance(inner, dict) else parameters
    for folder in (path.parent, path.parent.parent):
        file = folder / ".hydra/config.yaml"
        if file.is_file():
            yield file, _read_yaml(file)


def _read_yaml(file: Path) -> Mapping[str, Any]:
    import yaml

    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())
        raise CheckpointError(f"{file} is not YAML ({line}): restore or remove it") from None
    return raw if isinstance(raw, dict) else {}


def _said(file: Path, raw: Mapping[str, Any], assumptions: Assumptions) -> dict[str, Said]:
    for name, what in _OTHER_NETWORKS.items():
        for key in (name, f"algo.{name}", f"model.{name}"):
            if _value(raw, key) is True:
                raise CheckpointError(
                    f"{file.parent} cannot be read: {file.name} says {key}=true, a network {what}; "
                    "give an MDLM or Duo checkpoint without it"
                )
    found = {}
    for ours, names, kind in _VALUES:
        for theirs in names:
            value = _typed(file, theirs, _value(raw, theirs), kind)
            if value is not None:
                found[ours] = Said(value, f"{file.name} says {theirs}={text_of(value)}")
                break
    found |= _chosen(file, raw, "graph", ("graph.type", "graph", "diffusion"), assumptions)
    found |= _chosen(file, raw, "noise", ("noise.type", "noise"), assumptions)
    program, words = _kind(file, raw, found.get("graph.name", NOTHING).value == "uniform")
    if is_published(raw):
        missing = [name for name in _PUBLISHED if _value(raw, name) is None]
        if missing and file.name == CONFIG_FILE:
            raise CheckpointError(
                f"{file} lacks the key {missing[0].rpartition('.')[2]!r}; it must have "
                f"{', '.join(_PUBLISHED)}"
            )
        if program not in (None, _SCORE):
            raise CheckpointError(
                f"{file} has graph and tokens as SEDD's, and says {words}: correct one of them"
            )
        program, words = SEDD, "graph and tokens, as SEDD's"
        if isinstance(raw.get("tokens"), int):
            tokens = Said(raw["tokens"], f"{file.name} says tokens={raw['tokens']}")
            found["model.vocab_size"] = found["mask_id"] = tokens
    if program is None and words and assumptions.objective is None:
        mdlm, sedd, duo = (assumptions.spelled(**of) for of in (_AS_MDLM, _AS_SEDD, _AS_DUO))
        raise CheckpointError(
            f"{file} says {words}, which is not known here: say what it is, as {mdlm} (MDLM), or "
            f"{sedd} (SEDD), or {duo} with the latter (Duo)"
        )
    if program is _DUO:  # scaled scores are of absorb alone, though all configurations have the key
        found.pop("model.scale_by_sigma", None)
    for key, value in (program or {}).items():
        found.setdefault(key, Said(value, f"{file.name} says {words} ({key}={value})"))
    return found


def _typed(file: Path, key: str, value: Any, kind: type) -> Any:
    """A value as one of int, float or bool; None where it is none, or of a place elsewhere."""
    if value is None or (isinstance(value, str) and "${" in value):
        return None
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        number = float(value)  # some configurations write 1e-3 as text
        if not isinstance(value, bool) and kind(number) == number:
            return kind(number)
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    raise CheckpointError(f"{file} says {key}={value!r}, which is no {kind.__name__}: correct it")


def _kind(
    file: Path, raw: Mapping[str, Any], is_uniform: bool
) -> tuple[dict[str, Any] | None, str]:
    """The kind of network that a configuration names, if it is a known one, and its words.

    Raises:
        CheckpointError: it names two, or one that cannot be read.
    """
    words = ""
    found: list[tuple[dict[str, Any], str]] = []
    for key in ("model_type", "architectures", "algo.name"):
        value = _value(raw, key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str):
            words = words or f"{key}={value}"
            for name, kind in _KINDS.items():
                if re.search(rf"(?<![a-z]){name}", value.lower()):
                    found.append((kind, f"{key}={value}"))
                    break
            if re.search("bd3lm|(?<![a-z])ar(?![a-z])", value.lower()):
                raise CheckpointError(
                    f"{file.parent} cannot be read: {file.name} says {key}={value}, a network of "
                    "another attention; give an MDLM, Duo or SEDD checkpoint"
                )
    for key in ("parameterization", "algo.parameterization"):
        value = _value(raw, key)
        if isinstance(value, str):
            words = words or f"{key}={value}"
            if value.lower() in _PARAMETERIZATIONS:
                found.append((_PARAMETERIZATIONS[value.lower()], f"{key}={value}"))
    named = [kind for kind, _ in found if kind is not _D3PM] or [kind for kind, _ in found]
    if is_uniform:  # UDLM has the parametrisations of others
        named = [_DUO if kind in (_MDLM, _D3PM) else kind for kind in named]
    if any(kind != named[0] for kind in named):
        both = " and ".join(words for _, words in found)
        raise CheckpointError(f"{file} says {both}, two kinds of network: correct one of them")
    return (named[0], found[0][1]) if named else (None, words)


def _chosen(
    file: Path, raw: Mapping[str, Any], ours: str, names: tuple[str, ...], assumptions: Assumptions
) -> dict[str, Said]:
    """One of a few words, under one of several names."""
    for theirs in names:
        value = _value(raw, theirs)
        if not isinstance(value, str):
            continue
        known = _CHOICES[ours].get(re.sub("[^a-z]", "", value.lower()))
        if known is not None:
            return {f"{ours}.name": Said(known, f"{file.name} says {theirs}={value}")}
        if getattr(assumptions, ours) is None:
            raise CheckpointError(
                f"{file} says {theirs}={value}, which is not known here: give "
                f"{assumptions.spelled(**{ours: None})}"
            )
    return {}


def _value(raw: Mapping[str, Any], dotted: str) -> Any:
    value: Any = raw
    for word in dotted.split("."):
        value = value.get(word) if isinstance(value, Mapping) else None
    return value
