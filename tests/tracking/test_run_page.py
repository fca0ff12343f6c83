"""The page of runs: its numbers, the server, and what a browser draws of it."""

import html
import json
import math
import re
import shutil
import subprocess
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from sedd_scale.errors import ConfigError
from sedd_scale.tracking.metrics import TIME_KEYS
from sedd_scale.tracking.plots import read_run
from sedd_scale.tracking.run_page import MOST_POINTS, make_server, page_data
from tests.tracking.test_plot_run import plot, training_line, write_run

# Asks the page, after it has drawn, for what it drew, and for errors and requests it made.
PROBE = """<script>
const probe = {errors: window.failures, curves: [], read: ""};
for (const path of document.querySelectorAll("path[data-run]"))
  probe.curves.push([path.closest("svg").id, path.dataset.run, path.dataset.series,
    path.getAttribute("d")]);
const svg = document.getElementById("grad_norm");
svg.dispatchEvent(new KeyboardEvent("keydown", {key: "Home"}));
svg.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
probe.read = svg.parentNode.querySelector(".read").textContent;
probe.dots = document.querySelectorAll("circle").length;
probe.frames = document.querySelectorAll("iframe").length;
probe.requests = performance.getEntriesByType("resource").length;
const note = document.createElement("pre");
note.id = "probe";
note.textContent = JSON.stringify(probe);
document.body.append(note);
</script>"""
WATCH_ERRORS = """<script>window.failures = [];
window.onerror = message => { window.failures.push(message); };
document.addEventListener("securitypolicyviolation", event =>
  window.failures.push(event.violatedDirective));
</script>"""
TRACED = {
    "id": "0",
    "tokens": [1, 2],
    "text": "ab</script>",
    "seed": 0,
    "entropy": 0.5,
    "settings": {"sampler": "analytic"},
    "trace": {
        "pieces": [None, None],
        "events": [
            {"step": 0, "time": 0.5, "positions": [1], "tokens": [2], "pieces": ["</script>"]}
        ],
    },
}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs, the first with a step that is not finite, both with validations."""
    folders = []
    for number, name in enumerate(("first", "<second>")):
        lines = [training_line(step, 8.0 - step / 10 + number) for step in range(1, 41)]
        lines[3]["loss"] = None
        for step in (20, 40):
            by_time = {key: (k + 1) / 10 for k, key in enumerate(TIME_KEYS)}
            valid = {"step": step, "valid_nats_per_token": 6.5 - number, "valid_stderr": 0.2}
            lines.insert(step, {**valid, **by_time})
        folders.append(write_run(tmp_path / name, lines))
    return folders


def test_the_page_has_the_numbers_of_the_runs(runs: list[Path]) -> None:
    first = page_data([read_run(folder) for folder in runs])["runs"][0]
    assert first["step"] == list(range(1, 41))
    assert first["loss"][3] is None and first["loss"][39] == 4.0
    assert first["grad_norm"] == [1.0 / step for step in range(1, 41)]
    assert first["valid"] == {"step": [20, 40], "nats": [6.5, 6.5], "stderr": [0.2, 0.2]}
    assert first["by_time"]["nats"][1] == [(k + 1) / 10 for k in range(10)]
    json.dumps(first, allow_nan=False)


def test_a_long_run_is_thinned_to_its_newest_line(tmp_path: Path) -> None:
    lines = [training_line(step, 2.0) for step in range(1, 2 * MOST_POINTS + 3)]
    data = page_data([read_run(write_run(tmp_path / "long", lines))])["runs"][0]
    assert len(data["step"]) <= MOST_POINTS and data["step"][-1] == 2 * MOST_POINTS + 2


def test_the_server_reads_the_run_anew(runs: list[Path]) -> None:
    with make_server(0, lambda: [read_run(runs[0])]) as server:
        assert server.server_address[0] == "127.0.0.1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"

        def newest() -> float:
            with urllib.request.urlopen(f"{address}/data.json", timeout=20) as answer:
                return json.load(answer)["runs"][0]["step"][-1]

        assert newest() == 40
        with (runs[0] / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(training_line(41, 3.0)) + "\n")
        assert newest() == 41
        with urllib.request.urlopen(f"{address}/", timeout=20) as answer:
            assert b"connect-src 'self'" in answer.read()
        with pytest.raises(ConfigError, match="--port"):
            make_server(server.server_port, lambda: [])
        server.shutdown()


def points(path: str) -> np.ndarray:
    return np.array(
        [[float(number) for number in pair.split()] for pair in re.split("[ML]", path)[1:]]
    )


def test_a_browser_draws_the_curves_where_their_numbers_are(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium: nothing opens the page")
    (tmp_path / "samples.jsonl").write_text(json.dumps(TRACED) + "\n")
    page = tmp_path / "page.html"
    assert plot(*runs, "--output", page, "--samples", tmp_path / "samples.jsonl") == 0
    text = page.read_text(encoding="utf-8")
    # Nothing from elsewhere: the one address in the page names the language of its drawings.
    addresses = set(re.findall(r"https?://[^\s\"'\\]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}
    text = text.replace("<title>", f"{WATCH_ERRORS}<title>", 1)
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("</body>\n</html>", f"{PROBE}</body></html>"), encoding="utf-8")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", probed.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'<pre id="probe">(.*?)</pre>', dumped, re.DOTALL)
    assert found is not None, dumped[-2000:]
    probe = json.loads(html.unescape(found[1]))
    assert probe["errors"] == [] and probe["requests"] == 0
    assert probe["dots"] == 4 and probe["frames"] == 1
    curves = {tuple(curve[:3]): points(curve[3]) for curve in probe["curves"]}
    names = [str(folder) for folder in runs]
    steps = np.array([step for step in range(1, 41) if step != 4])
    pixels = []
    for number, name in enumerate(names):
        drawn = curves["loss", name, "loss"]
        assert len(drawn) == len(steps)
        pixels.append((drawn, 8.0 - steps / 10 + number))
        # Gradient norms on a logarithmic axis.
        norms = curves["grad_norm", name, "grad_norm"]
        expected = -np.log10(np.arange(1, 41))
        slope, start = np.polyfit(expected, norms[:, 1], 1)
        assert slope < 0
        np.testing.assert_allclose(norms[:, 1], slope * expected + start, atol=0.11)
    # One axis for both runs: pixels are a linear function of step and of nats, rising to the top.
    x = np.concatenate([drawn[:, 0] for drawn, _ in pixels])
    y = np.concatenate([drawn[:, 1] for drawn, _ in pixels])
    nats = np.concatenate([values for _, values in pixels])
    for values, drawn, sign in ((np.tile(steps, 2), x, 1), (nats, y, -1)):
        slope, start = np.polyfit(values, drawn, 1)
        assert slope * sign > 0
        np.testing.assert_allclose(drawn, slope * values + start, atol=0.11)
    # The keyboard went to the second line.
    assert f"step 2  {names[0]} 0.5" in probe["read"]
    assert not math.isnan(y.sum())
