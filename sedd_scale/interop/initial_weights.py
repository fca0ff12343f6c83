"""The weights of a finished model as the beginning of a new run: `model.init_from`.

Masters and averages become the source's averaged weights; moments and counts start from zero.

An autoregressive model without conditioning, as of transformers, may begin a run of another
objective, graph or parametrisation. What only the run has keeps the values of a fresh model: with
`model.adaln_gate_init=one` the network computes what the source does until it has learned more.

With `model.grow_vocab` a token keeps its id, the mask of absorb moves from N to the new last index
N', and new rows keep the values of a fresh model. In the scaled parametrisation
log s_y = z_y - ln(e^sigma - 1) - ln N. The true score of a token, p(y | what is unmasked) /
(e^sigma - 1), does not depend on N: the biases of old tokens take up ln(N' / N), and their scores
stay what they were. Unscaled outputs are log-scores and stay as they are. (Objectives of normalised
scores, and the mean parametrisation, share their unit out among old and new tokens.)
"""

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from sedd_scale.config import Config
from sedd_scale.data.corpus import Corpus
from sedd_scale.diffusion.objectives import Autoregressive, ScoreEntropy, make_objective
from sedd_scale.engine.engine import Engine
from sedd_scale.errors import CheckpointError, ConfigError
from sedd_scale.interop.adapted_tokenizer import fits
from sedd_scale.interop.assumptions import add_assumptions, assumptions_of, given_by_name, text_of
from sedd_scale.interop.checkpoint_source import CheckpointSource, model_shapes
from sedd_scale.interop.foreign_files import CheckpointFiles
from sedd_scale.interop.formats import detect_format, open_checkpoint
from sedd_scale.interop.same_network import differences
from sedd_scale.interop.sedd_names import VOCABULARY_PARAMETERS
from sedd_scale.tokenizers.base import Tokenizer
from sedd_scale.tokenizers.opening import open_tokenizer

BIAS = VOCABULARY_PARAMETERS[-1]


class InitialWeights:
    """An open source that fits a run, or fits it with a grown vocabulary.

    Args:
        config: the run's, with `model.vocab_size` filled in.

    Attributes:
        grown: tokens that the run has and the source has not.

    Raises:
        ConfigError: the run's model is another one; names the key, both values or shapes, the fix.
    """

    def __init__(self, source: CheckpointSource, config: Config) -> None:
        self.source = source
        described = source.described
        what = f"model.init_from={config.model.init_from}"
        if is_plain_causal(described.config):
            check_causal_start(config, described.config, what)
        else:
            check_same_model(config, described.config, what)
        if config.model.calibrate_head and not make_objective(described.config).cross_entropy:
            raise ConfigError(
                f"model.calibrate_head=true has no effect with {what}, whose outputs are scores: "
                "they have no free offset; leave it out"
            )
        assert config.model.vocab_size is not None
        self._num_tokens, self._old = config.model.vocab_size, described.num_tokens
        self.grown = self._num_tokens - self._old
        self._shapes = model_shapes(config)
        self._fresh = self._shapes.keys() - source.shapes.keys()
        self._has_mask = config.graph.facts.has_mask
        has_mask = described.config.graph.facts.has_mask
        self._same_rows = not self.grown and self._has_mask == has_mask
        self._scaled = config.resolved_scale_by_sigma
        if self.grown and not (config.model.grow_vocab and self.grown > 0):
            name = VOCABULARY_PARAMETERS[0]
            fix = "prepare the data with the tokenizer it was trained with"
            if self.grown < 0:
                fix += f", or set model.vocab_size={self._old} where it has a few unused ids more"
            else:
                fix += f", or set model.grow_vocab=true to add {self.grown} tokens behind its own"
            raise ConfigError(
                f"model.vocab_size={self._num_tokens}, the dataset's, does not fit {what}, which "
                f"has {self._old} tokens ({name} is {list(source.shapes[name])} there and "
                f"{list(self._shapes[name])} here): {fix}"
            )

    @property
    def description(self) -> str:
        """One line for the log of the run."""
        described = self.source.described
        step = f", step {described.step}" if described.step else ""
        grown = f", {self.grown} tokens added" if self.grown else ""
        return f"initialised from {self.source.path} ({self.source.format}{step}{grown})"

    def beyond(self, block_length: int) -> str | None:
        """A note where the run's blocks are longer than those the source was trained on."""
        trained = self.source.described.block_length
        if trained is None or block_length <= trained:
            return None
        return (
            f"note: blocks of {block_length} tokens are longer than the {trained} that "
            f"{self.source.path} was trained on"
        )

    def read(self, name: str) -> tuple[Tensor, Tensor | None]:
        """One parameter, whole, float32, in the run's shape, and which of its numbers are given.

        None means all of them; the others, rows of new tokens and what the source lacks, are zero
        and to be left as a fresh model has them.
        """
        if name in self._fresh:
            is_given = name == BIAS  # zeros
            return torch.zeros(self._shapes[name]), torch.full(self._shapes[name], is_given)
        tensor = self.source.read(name, "ema")
        if name not in VOCABULARY_PARAMETERS or self._same_rows:
            return tensor, None
        whole = torch.zeros(self._shapes[name])
        given = torch.zeros(self._shapes[name], dtype=torch.bool)
        old = self._old
        whole[:old], given[:old] = tensor[:old], True
        if self._has_mask:
            whole[-1], given[-1] = tensor[-1], True
        if name == BIAS and self._scaled:
            whole[:old] += math.log(self._num_tokens / old)
        return whole, given

    @torch.no_grad()
    def load_into(self, engine: Engine) -> None:
        """Fill the masters and averages of this process; collective over all processes.

        Each process reads one tensor after the other and keeps its own fragments of it.
        """
        fragments = engine.fragments
        fragments.ensure_state()
        for logical in engine.parameters:
            master = fragments.get(logical, "master")
            if master is None:
                continue
            whole, given = self.read(logical.name)
            own = slice(master.start, master.start + master.flat.numel())
            values = logical.slice_of(whole).flatten()[own].to(master.flat.device)
            if given is not None:
                is_given = logical.slice_of(given).flatten()[own].to(master.flat.device)
                values = torch.where(is_given, values, master.flat)
            master.flat.copy_(values)
            average = fragments.get(logical, "ema")
            assert average is not None and average.start == master.start, logical.name
            average.flat.copy_(values)
        fragments.refresh_parameters()


def open_initial_weights(config: Config, corpus: Corpus) -> InitialWeights | None:
    """The checkpoint that `model.init_from` names, found complete and fitting; None without one.

    Needs no process group. Hashes of a checkpoint of ours are compared by the first process alone.

    Raises:
        CheckpointError: nothing readable there, or not the model it describes.
        ConfigError: it is another model than the run's, or knows other tokens.
    """
    if config.model.init_from is None:
        return None
    path = Path(config.model.init_from)
    if not path.exists():
        raise ConfigError(
            f"model.init_from={path} does not exist: give the path of a run directory, a directory "
            "in the published format or of transformers, a checkpoint.pth, or a checkpoint of MDLM "
            "or Duo"
        )
    is_first = os.environ.get("RANK", "0") == "0"
    key = "model.init_options"
    options = config.model.init_options or ""
    pairs = dict(pair.split("=", 1) for pair in options.split(",") if "=" in pair)
    if options.count(",") + 1 != len(pairs) and options:
        raise ConfigError(f"{key}={options} is not of the form name=value,name=value")
    # What neither the files nor the user say is as the run has it; of MDLM's outputs, which are
    # scaled log-scores whatever the run would have them, the scale is known.
    otherwise = {"graph": config.graph.name, "num_heads": config.model.num_heads}
    files = CheckpointFiles(path, verify=config.checkpoint.verify and is_first)
    if detect_format(files) == "sedd-train":
        otherwise["scale_by_sigma"] = config.resolved_scale_by_sigma
    source = open_checkpoint(
        files,
        assumptions=assumptions_of(
            given_by_name(add_assumptions, pairs, key), spelling=f"{key}=", **otherwise
        ),
    )
    weights = InitialWeights(source, config)
    _check_tokenizer(source, config, corpus)
    return weights


def check_same_model(config: Config, found: Config, what: str) -> None:
    """Refuse a network that is not the one configured; vocabularies may differ.

    Args:
        found: the configuration that the checkpoint describes.
        what: what the error calls the checkpoint.

    Raises:
        ConfigError: names the key, both values, a tensor with both shapes, and the fix.
    """
    ours, theirs = make_objective(config), make_objective(found)
    apart = differences(config, found)
    if ours.cross_entropy or theirs.cross_entropy:
        # Outputs of cross-entropy are logits of the clean token's law anyway.
        apart.pop("model.parametrisation", None)
    _refuse(apart, config, found, what)
    if ours.causal != theirs.causal and not (theirs.causal and config.training.anneal_steps):
        wanted, has = config.training.objective, found.training.objective
        other = " or training.anneal_steps, over which it changes" if theirs.causal else ""
        raise ConfigError(
            f"training.objective={wanted} does not fit {what}, a network of {has}: its attention "
            f"is another; set training.objective={has}{other}"
        )


def _refuse(
    apart: dict[str, tuple[object, object]], config: Config, found: Config, what: str
) -> None:
    for key in ("graph.name", *apart):  # from which others may follow
        if key in apart:
            wanted, has = map(text_of, apart[key])
            raise ConfigError(
                f"{key}={wanted} does not fit {what}, which has {has}"
                f"{_shapes_apart(config, found)}: set {key}={has}"
            )


def is_plain_causal(found: Config) -> bool:
    """Whether a network is autoregressive, and nothing conditions it."""
    objective, conditioning = found.training.objective, found.model.conditioning
    return objective == Autoregressive.name and conditioning == "none"


# Keys in which a run may differ from such a source.
_FREE = {
    *("graph.name", "model.parametrisation", "model.scale_by_sigma", "model.head_bias"),
    *("model.conditioning", "model.time_conditioning", "model.cond_dim", "training.shift"),
}


def check_causal_start(config: Config, found: Config, what: str) -> None:
    """Refuse a run that cannot begin with an autoregressive network.

    Args:
        found, what: as of `check_same_model`.

    Raises:
        ConfigError: the trunk is another one, or the run would not begin as the source.
    """
    apart = differences(config, found)
    _refuse({key: apart[key] for key in apart if key not in _FREE}, config, found, what)
    model = config.model
    if found.model.head_bias and not model.head_bias:
        raise ConfigError(
            f"model.head_bias=false does not fit {what}, which has true: set model.head_bias=true"
        )
    for key, wanted in (("model.adaln_gate_init", "one"), ("model.zero_init", True)):
        if model.conditioning == "adaln" and config.value(key) != wanted:
            raise ConfigError(
                f"{key}={text_of(config.value(key))} would not begin as {what}, which nothing "
                f"conditions: set {key}={text_of(wanted)}, or model.conditioning=none"
            )
    is_normalised = model.parametrisation == "mean" or model.calibrate_head
    if config.training.objective == ScoreEntropy.name and not is_normalised:
        raise ConfigError(
            f"model.parametrisation=score does not fit {what}: logits of an autoregressive model "
            "have a free offset, and scores have none; set model.parametrisation=mean or "
            "model.calibrate_head=true"
        )


def _shapes_apart(config: Config, found: Config) -> str:
    """The first tensor that differs by more than its vocabulary, in parentheses."""
    same_vocabulary = config.override(f"model.vocab_size={found.model.vocab_size}")
    here, there = model_shapes(same_vocabulary), model_shapes(found)
    for name in {**here, **there}:
        if here.get(name) != there.get(name):
            has, wanted = (list(s[name]) if name in s else "missing" for s in (there, here))
            return f" ({name} is {has} there and {wanted} here)"
    return ""


def _check_tokenizer(source: CheckpointSource, config: Config, corpus: Corpus) -> None:
    """Where both tokenizers are known, every token of the source must be the data's as well."""
    directory = source.described.tokenizer_directory
    if directory is None:
        return
    theirs, ours = open_tokenizer(directory), corpus.load_tokenizer()
    if theirs.fingerprint == ours.fingerprint:
        return
    if not fits(theirs.vocab_size, source.described.num_tokens):
        raise CheckpointError(
            f"{directory} has {theirs.vocab_size} tokens and its checkpoint "
            f"{source.described.num_tokens}: it is not the tokenizer of that model"
        )
    difference = _different_token(theirs, ours)
    if difference is not None:
        raise ConfigError(
            f"{corpus.location} was prepared with another tokenizer than "
            f"model.init_from={config.model.init_from} was trained with: {difference}; prepare the "
            f"data with {directory}, or with a tokenizer that adds tokens behind its own"
        )


def _different_token(theirs: Tokenizer, ours: Tokenizer) -> str | None:
    if theirs.eos_id != ours.eos_id:
        return f"the end of a document is token {theirs.eos_id} there and {ours.eos_id} here"
    if ours.vocab_size < theirs.vocab_size:
        return f"there are {theirs.vocab_size} tokens there and {ours.vocab_size} here"
    for token in range(theirs.vocab_size):
        there, here = theirs.decode([token]), ours.decode([token])
        if there != here:
            return f"token {token} is {there!r} there and {here!r} here"
    return None
