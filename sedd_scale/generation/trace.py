"""The trajectory of a sample: which position took which token at which time, as it was drawn.

A trace is plain JSON: `pieces`, for each position the text of a given token or None; `events`, one
a step that changed something: `step`, `time` (from 1, all noise, to 0), `positions`, `tokens` (None
where a token is taken back to the mask) and `pieces`, the tokens' texts.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from sedd_scale.errors import DataError
from sedd_scale.sampling.infill import Given
from sedd_scale.tokenizers.base import Tokenizer

Trace = dict[str, Any]


class TraceRecorder:
    """Notes what changes between the steps of some samples of a batch.

    Args:
        givens: what is given of each, by its row in the batch.
        mask_id: the mask, under an absorbing graph.
    """

    def __init__(self, givens: Mapping[int, Given], *, mask_id: int | None) -> None:
        self._givens, self._mask_id = givens, mask_id
        # Without masks a position starts from a token that its first event brings.
        empty = -1 if mask_id is None else mask_id
        self._before = {
            row: np.where(given.fixed_L, given.tokens_L, empty) for row, given in givens.items()
        }
        self._events: dict[int, list[dict[str, Any]]] = {row: [] for row in givens}

    def on_step(self, step: int, time_B: Tensor, state_BL: Tensor) -> None:
        """What the sampler calls after a step.

        Args:
            step: from 0.
            time_B: the time each sequence has reached.
            state_BL: tokens and masks after the step; a row may be longer than its sample.
        """
        for row, before_L in self._before.items():
            state_L = state_BL[row, : len(before_L)].numpy()
            positions = np.flatnonzero(state_L != before_L)
            if len(positions):
                tokens = state_L[positions].tolist()
                self._events[row].append(
                    {
                        "step": step,
                        "time": float(time_B[row]),
                        "positions": positions.tolist(),
                        "tokens": [None if token == self._mask_id else token for token in tokens],
                    }
                )
                before_L[positions] = state_L[positions]

    def traces(self, tokenizer: Tokenizer | None) -> dict[int, Trace]:
        """The traces by row; without a tokenizer a piece is the token's number."""
        spell = _Speller(tokenizer)
        traces = {}
        for row, given in self._givens.items():
            for event in self._events[row]:
                event["pieces"] = [spell(token) for token in event["tokens"]]
            pieces = [
                spell(token) if fixed else None
                for token, fixed in zip(given.tokens_L.tolist(), given.fixed_L.tolist())
            ]
            traces[row] = {"pieces": pieces, "events": self._events[row]}
        return traces


class _Speller:
    """The text of single tokens, as they read behind other text."""

    _ANCHOR = "a"

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        if tokenizer is not None:
            # A tokenizer may drop a space where text begins; behind another token it shows.
            self._anchor = tokenizer.encode(self._ANCHOR)[-1:].tolist()
            self._anchor_text = tokenizer.decode(self._anchor)

    def __call__(self, token: int | None) -> str | None:
        if token is None:
            return None
        if self._tokenizer is None:
            return f" {token}"
        if token not in self._known:
            text = self._tokenizer.decode([*self._anchor, token])
            self._known[token] = text.removeprefix(self._anchor_text)
        return self._known[token]


class Frame:
    """The state of a traced sample after some of its events.

    Attributes:
        pieces: the text at each position, None where the mask is.
        filled: which event filled each position; -1 for given ones and masks.
    """

    def __init__(self, trace: Trace) -> None:
        self.pieces: list[str | None] = list(trace["pieces"])
        self.filled = [-1] * len(self.pieces)
        self._events = trace["events"]
        self._next = 0

    def advance(self) -> dict[str, Any] | None:
        """Apply the next event and return it; None after the last."""
        if self._next == len(self._events):
            return None
        event: dict[str, Any] = self._events[self._next]
        for position, piece in zip(event["positions"], event["pieces"]):
            self.pieces[position] = piece
            self.filled[position] = -1 if piece is None else self._next
        self._next += 1
        return event


def trace_of(record: dict[str, Any]) -> Trace:
    """The trace of a record.

    Raises:
        DataError: the record has none, or none that can be read.
    """
    trace = record.get("trace")
    if trace is None:
        raise DataError(f"sample {record.get('id')!r} has no trace: generate it with --trace")
    try:
        length = len(trace["pieces"])
        for event in trace["events"]:
            float(event["time"])
            int(event["step"])
            if len(event["positions"]) != len(event["pieces"]) or not all(
                0 <= position < length for position in event["positions"]
            ):
                raise ValueError("positions do not fit")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the trace of sample {record.get('id')!r} is damaged: {error}") from error
    found: Trace = trace
    return found
