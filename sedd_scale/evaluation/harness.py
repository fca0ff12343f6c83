"""lm-evaluation-harness's view of a model: likelihoods through the bound, text through infilling.

    python -m sedd_scale.evaluation.harness --model sedd_scale \
        --model_args checkpoint=runs/books --tasks lambada_openai

is the harness's own command line with the model registered. A program that imports this module can
name the model too; `lm_eval` itself looks in no other package for models. The harness comes with
`pip install 'sedd_scale[harness]'`.

`loglikelihood` is minus the bound on a continuation whose context stays clean: noise moves the
continuation alone. Every request has the same draws, so what two continuations differ by is not the
luck of their masks. An autoregressive model has its exact likelihood. `is_greedy` says whether
filling the continuation with the likeliest token, the surest position first, gives it back; under
the uniform graph, whose samplers have no likeliest token, it is never claimed.
"""

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from sedd_scale.cli import outlive_outputs, outlive_stdout
from sedd_scale.errors import ConfigError, DataError, SeddScaleError
from sedd_scale.evaluation.bound import evaluate_bound
from sedd_scale.evaluation.shared_work import over_ranks
from sedd_scale.generation.batch import Request, cut_batches, draw_tokens
from sedd_scale.generation.completions import settings_for
from sedd_scale.interop.assumptions import given_by_name
from sedd_scale.interop.model_arguments import add_model_arguments, open_model
from sedd_scale.sampling import AUTOREGRESSIVE
from sedd_scale.sampling.infill import infill_from_tokens

MODEL_NAME = "sedd_scale"
_MOST_GENERATED = 256
# What fills with the likeliest token, by the kind of model.
GREEDY = {"absorb": "confidence", AUTOREGRESSIVE: "left-to-right"}


@register_model(MODEL_NAME)
class SeddScaleLM(LM):
    """A checkpoint as the harness asks it.

    Args:
        checkpoint, model: as the options of `sedd-scale eval_ppl` that name a model, such as
            `tokenizer_path=PATH` and `mask_id=4` for --mask-id 4.
        draws: times a request is looked at.
        seed: of all draws.
        batch_size: sequences at a time.
        max_length: tokens of context and continuation together; the model's block by default.
        steps, sampler: of generated text; the samplers' own defaults.
        device: "cpu" keeps the weights there; else they go to the process's GPU, if it has one
            (the harness says "cuda:0" where nothing was said).
        max_batch_size: not more than this many.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        draws: int = 16,
        seed: int = 0,
        batch_size: int | str = 16,
        max_length: int | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        **model: Any,
    ) -> None:
        super().__init__()
        try:
            size = int(batch_size)
        except ValueError:
            raise ConfigError(f"batch_size={batch_size}: give a number such as 16") from None
        self.batch_size = size if max_batch_size is None else min(size, int(max_batch_size))
        named = given_by_name(
            add_model_arguments, {"checkpoint": checkpoint, **model}, "the model's arguments"
        )
        self.model = open_model(named, device=device if device == "cpu" else None, spelling="")
        if self.model.tokenizer is None:
            raise DataError(
                f"checkpoint={checkpoint} carries no tokenizer: give tokenizer_path=PATH"
            )
        # What stands before a text without a context, where a model predicts no first token.
        first = self.model.objective.first_is_given
        self.start = [self.model.first_token()] if first else []
        self.max_length = (max_length or self.model.block_length or 1024) - len(self.start)
        self.draws, self.seed = draws, seed
        options = {"steps": steps, "sampler": sampler}
        self.sampling = {name: value for name, value in options.items() if value is not None}

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log-probability in nats, from below, and `is_greedy`."""
        spans = [self._encoded(*request.args) for request in requests]
        found = self._log_probabilities(spans)
        pairs = list(zip(found, self._are_greedy(spans), strict=True))
        for request, pair in zip(requests, pairs, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, pair)
        return pairs

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of each whole text, cut into blocks of `max_length` that stand alone."""
        spans: list[tuple[list[int], list[int]]] = []
        owner: list[int] = []
        for number, request in enumerate(requests):
            ids = self._encode(request.args[0])
            for begin in range(0, len(ids), self.max_length):
                spans.append((self.start, ids[begin : begin + self.max_length]))
                owner.append(number)
        totals = np.zeros(len(requests))
        np.add.at(totals, owner, self._log_probabilities(spans))
        return [float(value) for value in totals]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Text behind each context, up to the first of the strings that end it."""
        drawn = self._filled([self._continuation(*request.args) for request in requests])
        return [
            self._text(tokens, request.args[1])
            for tokens, request in zip(drawn, requests, strict=True)
        ]

    def _continuation(self, context: str, options: dict[str, Any]) -> Request:
        """A context with free positions behind it."""
        wanted = int(options.get("max_gen_toks") or options.get("max_tokens") or _MOST_GENERATED)
        wanted = max(1, min(wanted, self.max_length - 1))
        given = self._encode(context)[-(self.max_length - wanted) :] or self.start
        settings: dict[str, Any] = dict(self.sampling)
        greedy = GREEDY.get(self.model.kind)
        if greedy is not None:
            sampled = options.get("do_sample", False)
            settings["temperature"] = float(options.get("temperature") or 0.0) if sampled else 0.0
            if settings["temperature"] == 0.0:
                settings.setdefault("sampler", greedy)
        return self._request(given, wanted, self.seed, settings)

    def _text(self, tokens: list[int], options: dict[str, Any]) -> str:
        """What generated tokens spell, up to EOS or the first of the strings that end the text."""
        assert self.model.tokenizer is not None
        eos = self.model.tokenizer.eos_id
        if eos in tokens and not self.model.tokenizer.eos_in_text:
            tokens = tokens[: tokens.index(eos)]
        text = self.model.tokenizer.decode(tokens)
        until = options.get("until") or []
        for end in [until] if isinstance(until, str) else until:
            if end:
                text = text.partition(end)[0]
        return text

    def _request(
        self, given: list[int], num_free: int, seed: int, options: dict[str, Any]
    ) -> Request:
        length = len(given) + num_free
        num_tokens = self.model.graph.num_tokens
        prefix = infill_from_tokens(given, range(len(given)), num_tokens, length)
        # The same draws for every request, as for the likelihoods.
        settings = settings_for(self.model, options)
        return Request(id=0, given=prefix, seed=seed, number=0, settings=settings)

    def _filled(self, requests: Sequence[Request]) -> list[list[int]]:
        """The tokens drawn behind the given ones of each request; collective."""
        batches = cut_batches(requests, self.batch_size)

        def drawn(which: int) -> tuple[list[int], ...]:
            batch = [requests[index] for index in batches[which]]
            found = zip(draw_tokens(self.model, batch), batch, strict=True)
            return tuple(tokens_L[~request.given.fixed_L].tolist() for tokens_L, request in found)

        filled: list[list[int]] = [[] for _ in requests]
        of_batches = over_ranks(self.model.layout, len(batches), drawn)
        for indices, tokens in zip(batches, of_batches, strict=True):
            for index, own in zip(indices, tokens, strict=True):
                filled[index] = own
        return filled

    def _encode(self, text: str) -> list[int]:
        assert self.model.tokenizer is not None
        return [int(token) for token in self.model.tokenizer.encode(text)]

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both together, cut behind as many as the context alone has, as the harness does.

        Where that leaves nothing of a continuation, its first token began within the context: the
        cut is before it. Only a continuation that spells nothing has no ids.
        """
        # A word's space belongs to the word, as tokenizers write it.
        bare = context.rstrip()
        context, continuation = bare, context[len(bare) :] + continuation
        given = self._encode(context) if context else []
        whole = self._encode(context + continuation)
        cut = len(given)
        if cut >= len(whole) and continuation:
            alike = (own == other for own, other in zip(given, whole[:-1]))
            cut = sum(itertools.takewhile(bool, alike))
        target = whole[cut:]
        if len(target) > self.max_length:
            raise DataError(
                f"a continuation of {len(target)} tokens cannot be scored in blocks of "
                f"{self.max_length}: give a task with others, or max_length"
            )
        room = self.max_length - len(target)
        return whole[max(0, cut - room) : cut] or self.start, target

    def _log_probabilities(self, spans: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Minus the bound of each second part given the first, in nats; collective."""
        found = [0.0] * len(spans)
        by_length: dict[int, list[int]] = {}
        for number, (given, target) in enumerate(spans):
            if target:  # what has no token has the likelihood 1
                by_length.setdefault(len(given) + len(target), []).append(number)
        causal = self.model.causal
        for _, numbers in sorted(by_length.items()):
            result = evaluate_bound(
                self.model,
                torch.tensor([spans[number][0] + spans[number][1] for number in numbers]),
                draws=None if causal else self.draws,
                # As many of one sample as of many: a request's draws depend on no other request.
                replicates=None if causal else 2,
                seed=self.seed,
                batch_size=self.batch_size,
                block_ids_n=np.zeros(len(numbers), dtype=np.int64),
                context_n=np.array([len(spans[number][0]) for number in numbers]),
            )
            for number, nats in zip(numbers, result.block_nats_n, strict=True):
                found[number] = -float(nats) * len(spans[number][1])
        return found

    def _are_greedy(self, spans: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether each second part is what the likeliest tokens after the first are; collective."""
        if self.model.kind not in GREEDY:
            return [not target for _, target in spans]
        options = {"temperature": 0.0, "sampler": GREEDY[self.model.kind]}
        requests = [
            self._request(given, len(target), 0, options) for given, target in spans if target
        ]
        drawn = iter(self._filled(requests))
        return [not target or next(drawn) == target for _, target in spans]


def main() -> int:
    """The harness's command line, with one line for an error of the input."""
    from lm_eval.__main__ import cli_evaluate

    outlive_outputs()
    outlive_stdout("standard output takes no more; the rest follows here", on_stderr=True)
    try:
        cli_evaluate()
    except SeddScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
