"""What an evaluation reports: a JSON object, and a table of it for people."""

import sys
import time
from dataclasses import asdict
from typing import Any

from sedd_scale.evaluation.result import BoundResult
from sedd_scale.evaluation.text_blocks import EvaluationText
from sedd_scale.quantities import format_duration


def report_of(
    result: BoundResult, corpus: EvaluationText, *, objective: str, **origin: Any
) -> dict[str, Any]:
    """The JSON object of an evaluation; `origin` is what it was of: checkpoint, seed and others."""
    others = {"normalised": result.normalised, "likelihood": result.likelihood}
    return {
        "objective": objective,
        "kind": result.kind,
        "nats_per_token": result.nats_per_token,
        "bits_per_token": result.bits_per_token,
        "bits_per_char": result.bits_per_token / corpus.characters_per_token,
        "bits_per_byte": result.bits_per_token / corpus.bytes_per_token,
        "perplexity": result.perplexity,
        "stderr": result.stderr,
        "stderr_text": result.stderr_text,
        "ci95": list(result.ci95),
        "terms": result.terms,
        **{
            f"{name}_{key}": value
            for name, other in others.items()
            if other is not None
            for key, value in asdict(other).items()
        },
        "draws": result.draws,
        "replicates": result.replicates,
        "blocks": result.blocks,
        "source_blocks": corpus.source_blocks,
        "block_length": corpus.block_length,
        "tokens": result.tokens,
        "dropped_tokens": corpus.dropped_tokens,
        "wrap": corpus.wrap,
        "remainder": corpus.remainder,
        "documents": corpus.documents,
        "detokenizer": corpus.detokenizer,
        "unknown_share": corpus.unknown_share,
        "notes": {**dict(corpus.notes), **result.notes},
        "network_calls": result.network_calls,
        "protocol": result.protocol,
        "t_min": result.t_min,
        "data": corpus.name,
        "data_fingerprint": corpus.fingerprint,
        **origin,
        "seconds": round(result.seconds, 3),
    }


def format_table(report: dict[str, Any]) -> str:
    """The report for people."""

    def number(value: float | None) -> str:
        return "left out" if value is None else f"{value:.4f}"

    text = report["stderr_text"]
    rows = [
        ("checkpoint", f"{report['checkpoint']} ({report['weights']})"),
        ("objective", report["objective"]),
        ("data", report["data"]),
        (
            "blocks",
            f"{report['blocks']:,} of {report['source_blocks']:,}, {report['block_length']} tokens "
            "each",
        ),
        ("text", _text_row(report)),
        *(("", f"{count:,} {what}") for what, count in report["notes"].items()),
        ("unknown tokens", f"{report['unknown_share']:.4%}"),
        *_nats_rows(report),
        ("  over blocks", "one block only" if text is None else f"± {text:.4f} (other text)"),
    ]
    if report["kind"] == "bound":
        terms = report["terms"]
        rows += [(f"  {name}", number(terms[name])) for name in terms]
    for name, meaning in (
        ("normalised", "the bound with normalised scores"),
        ("likelihood", "an estimate from above of the likelihood itself"),
    ):
        if f"{name}_nats_per_token" in report:
            value, error = report[f"{name}_nats_per_token"], report[f"{name}_stderr"]
            rows.append((f"  {name}", f"{value:.4f} ± {error:.4f} ({meaning})"))
    rows += [
        ("bits/token", f"{report['bits_per_token']:.4f}"),
        ("bits/char", f"{report['bits_per_char']:.4f}"),
        ("bits/byte", f"{report['bits_per_byte']:.4f}"),
        ("perplexity", f"{report['perplexity']:.3f}"),
        ("seconds", f"{report['seconds']:.1f}"),
    ]
    return "\n".join(f"{name:18}{value}" for name, value in rows)


def _text_row(report: dict[str, Any]) -> str:
    """How text became blocks."""
    rest = {
        "drop": f"{report['dropped_tokens']:,} tokens that fill no block dropped",
        "pad": "blocks that are not full padded, nothing dropped",
    }[report["remainder"]]
    packed = "documents wrapped" if report["wrap"] else "each document begins a block"
    if report["documents"] is None:
        return f"{packed}; {rest}"
    documents = {"joined": "one document", "rows": "a document per row", "all-rows": "every row"}
    made = f"detokenizer {report['detokenizer']}, {documents[report['documents']]}"
    return f"{made}, {packed}; {rest}"


def _nats_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """How the number came about, and the number."""
    nats = f"{report['nats_per_token']:.4f}"
    if report["kind"] == "exact":
        return [("protocol", "exact likelihood by the chain rule"), ("nats/token", nats)]
    low, high = report["ci95"]
    what = "orders" if report["kind"] == "any-order" else "draws"
    return [
        ("protocol", f"{report['protocol']}, {report['draws']} {what} a block"),
        ("nats/token", f"{nats} ± {report['stderr']:.4f}"),
        ("  95% interval", f"{low:.4f} .. {high:.4f} (over draws)"),
    ]


class Progress:
    """Tells on stderr how far this process is: in place on a terminal, else now and then."""

    def __init__(self, *, shown: bool, every: float = 30.0) -> None:
        self.shown, self.every = shown, every
        self.start = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` groups of blocks."""
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if not self.shown or not (terminal or now - self.last >= self.every):
            return
        self.last = now
        left = (now - self.start) / done * (total - done)
        line = f"group {done:,} of {total:,}, {format_duration(left)} to go"
        if terminal:
            end = "\n" if done == total else ""
            print(f"\r{line}\x1b[K", end=end, file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
