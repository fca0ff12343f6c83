"""Runs as one HTML page that needs nothing else, and a local server that keeps it fresh."""

import json
import math
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sedd_scale.arrays import FloatArray
from sedd_scale.errors import ConfigError, SeddScaleError
from sedd_scale.tracking.metrics import TIME_KEYS
from sedd_scale.tracking.plots import SMOOTHED_LINES, SMOOTHED_SHARE, RunMetrics, smooth
from sedd_scale.tracking.run_page_html import PAGE

# Of a curve on the page; a longer run is thinned.
MOST_POINTS = 3000
REFRESH_SECONDS = 3


def page_data(runs: Sequence[RunMetrics]) -> dict[str, Any]:
    """What the page draws, of plain JSON types: a number that is not finite is null."""
    return {"runs": [_run_data(run) for run in runs]}


def run_page(runs: Sequence[RunMetrics], *, traces: str | None = None, live: bool = False) -> str:
    """The page's HTML.

    Args:
        traces: a page of sample trajectories to show below the curves.
        live: ask the server that the page comes from for new numbers now and then.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    if live:
        policy += "; connect-src 'self'"
    data = {**page_data(runs), "traces": traces, "refresh": REFRESH_SECONDS if live else None}
    # Text must not end the script element, whatever it holds.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return PAGE.replace("@POLICY@", policy).replace("@DATA@", text)


def make_server(
    port: int, read: Callable[[], Sequence[RunMetrics]], *, traces: str | None = None
) -> ThreadingHTTPServer:
    """A server of the page on 127.0.0.1, which reads the runs anew at every request.

    Args:
        port: 0: any free one.

    Raises:
        ConfigError: the port is taken or not allowed.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path not in ("/", "/data.json"):
                self.send_error(404)
                return
            try:
                runs = read()
                if self.path == "/":
                    kind, text = "text/html", run_page(runs, traces=traces, live=True)
                else:
                    kind, text = "application/json", json.dumps(page_data(runs))
            except SeddScaleError as error:
                self.send_error(503, explain=str(error))
                return
            body = text.encode("utf-8", errors="replace")
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not worth a line."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--port {port} cannot be listened on ({error}): give another, or 0 for any free one"
        ) from error


def _run_data(run: RunMetrics) -> dict[str, Any]:
    training, checks, times = run.training, run.validation, run.by_time
    stride = max(1, math.ceil(len(training["step"]) / MOST_POINTS))
    lines = max(SMOOTHED_LINES, round(SMOOTHED_SHARE * len(training["step"])))
    smoothed = smooth(training["loss"], lines)

    def thinned(values: FloatArray) -> list[float | None]:
        # The newest line is always there.
        return _numbers(values[::-1][::stride][::-1])

    return {
        "name": run.name,
        "unigram": run.unigram_nats,
        "step": thinned(training["step"]),
        "loss": thinned(training["loss"]),
        "smoothed": thinned(smoothed),
        **{key: thinned(training[key]) for key in ("grad_norm", "lr", "tokens_per_second")},
        "valid": {
            "step": _numbers(checks["step"]),
            "nats": _numbers(checks["valid_nats_per_token"]),
            "stderr": _numbers(checks["valid_stderr"]),
        },
        "by_time": {
            "step": _numbers(times["step"]),
            "nats": [_numbers(row) for row in zip(*(times[key] for key in TIME_KEYS))],
        },
    }


def _numbers(values: Any) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]
