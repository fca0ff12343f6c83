"""Traced samples as one HTML page that needs nothing else: a slider over the steps, and a map."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sedd_scale.files.atomic import write_atomically
from sedd_scale.generation.trace import trace_of


def write_trace_page(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write the page of records that hold a trace, whole or not at all.

    Raises:
        DataError: a record without a trace.
    """
    write_atomically(path, trace_page(records).encode("utf-8", errors="replace"))


def trace_page(records: Sequence[dict[str, Any]]) -> str:
    """The page's HTML."""
    samples = []
    for record in records:
        trace = trace_of(record)
        settings = record.get("settings", {})
        samples.append(
            {
                "id": record["id"],
                "seed": record.get("seed"),
                "sampler": settings.get("sampler"),
                "entropy": record.get("entropy"),
                "pieces": trace["pieces"],
                "events": [
                    [event["step"], event["time"], event["positions"], event["pieces"]]
                    for event in trace["events"]
                ],
            }
        )
    # Text must not end the script element, whatever it holds.
    data = json.dumps(samples, ensure_ascii=False).replace("<", "\\u003c")
    return _PAGE.replace("@DATA@", data)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Sampling, step by step</title>
<style>
:root { color-scheme: light dark; --line: #8884; --mask: #8883; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 1.5rem auto;
  padding: 0 1rem; }
header { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: center; }
h1 { font-size: 1.1rem; margin: 0 1rem 0 0; }
#slider { flex: 1 1 14rem; }
#status { font-variant-numeric: tabular-nums; min-width: 100%; opacity: .8; }
#text { font: 15px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid var(--line); border-radius: .4rem; padding: .8rem; margin: 1rem 0; }
#text span { border-radius: .2rem; }
.mask { background: var(--mask); color: transparent; }
.given { font-weight: 700; }
.new { outline: 2px solid #e67e22; }
#map { width: 100%; height: 9rem; border: 1px solid var(--line); border-radius: .4rem; }
small { opacity: .75; }
button, select { font: inherit; }
</style>
</head>
<body>
<header>
<h1>Sampling, step by step</h1>
<label>sample <select id="sample"></select></label>
<button id="play" type="button">play</button>
<label>steps/s <select id="speed"><option>2<option selected>8<option>30</select></label>
<input id="slider" type="range" min="0" value="0" aria-label="step">
<div id="status" role="status"></div>
</header>
<div id="text"></div>
<svg id="map" preserveAspectRatio="none" role="img" aria-label="position against step"></svg>
<small>Bold: given. Grey: still masked. Colour: when a position was filled, from early (blue) to
late (red). Outlined: changed in the step shown. The map has positions from left to right and steps
from top to bottom.</small>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const samples = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id);
const [pick, play, speed, slider, status, text, map] =
  ["sample", "play", "speed", "slider", "status", "text", "map"].map(get);
let sample, timer = null;

samples.forEach((entry, number) => {
  const option = document.createElement("option");
  option.value = number;
  option.textContent = entry.id;
  pick.append(option);
});

function hue(event) {
  const last = Math.max(1, sample.events.length - 1);
  return 230 - 230 * event / last;
}

function stateAfter(count) {
  const pieces = sample.pieces.slice(), filled = pieces.map(piece => piece === null ? -1 : -2);
  for (let number = 0; number < count; number++) {
    const [, , positions, changed] = sample.events[number];
    positions.forEach((position, k) => {
      pieces[position] = changed[k];
      filled[position] = changed[k] === null ? -1 : number;
    });
  }
  return [pieces, filled];
}

function show() {
  const count = Number(slider.value), [pieces, filled] = stateAfter(count);
  text.replaceChildren(...pieces.map((piece, position) => {
    const span = document.createElement("span");
    if (piece === null) {
      span.textContent = "__";
      span.className = "mask";
      span.append(document.createElement("wbr"));
    } else {
      span.textContent = piece;
      if (filled[position] === -2) span.className = "given";
      else span.style.background = `hsl(${hue(filled[position])} 80% 55% / .28)`;
      if (filled[position] === count - 1) span.classList.add("new");
    }
    const when = filled[position] >= 0 ? sample.events[filled[position]] : null;
    span.title = `position ${position}` + (when ? `, step ${when[0]}, time ${when[1]}` : "");
    return span;
  }));
  const event = count ? sample.events[count - 1] : null;
  const masks = pieces.filter(piece => piece === null).length;
  status.textContent = (event ? `step ${event[0]}, time ${event[1].toFixed(4)}` : "start, time 1") +
    ` - ${pieces.length - masks} of ${pieces.length} positions` +
    ` - sampler ${sample.sampler}, seed ${sample.seed}` +
    (sample.entropy === null ? "" : `, token entropy ${sample.entropy.toFixed(3)} nats`);
  const cursor = get("cursor");
  if (cursor) cursor.setAttribute("y", count);
}

function draw() {
  const name = "http://www.w3.org/2000/svg", events = sample.events;
  map.setAttribute("viewBox", `0 0 ${sample.pieces.length} ${events.length + 1}`);
  const box = (x, y, width, height, fill) => {
    const rect = document.createElementNS(name, "rect");
    Object.entries({x, y, width, height, fill}).forEach(([key, value]) =>
      rect.setAttribute(key, value));
    return rect;
  };
  const boxes = events.flatMap(([, , positions, pieces], number) => positions.map((x, k) =>
    box(x, number + 1, 1, 1, pieces[k] === null ? "#888" : `hsl(${hue(number)} 80% 50%)`)));
  const cursor = box(0, 0, sample.pieces.length, 1, "#e67e2255");
  cursor.id = "cursor";
  map.replaceChildren(...boxes, cursor);
}

function choose(number) {
  sample = samples[number];
  slider.max = sample.events.length;
  slider.value = sample.events.length;
  draw();
  show();
}

function stop() {
  clearInterval(timer);
  timer = null;
  play.textContent = "play";
}

play.onclick = () => {
  if (timer !== null) return stop();
  if (slider.value === slider.max) slider.value = 0;
  play.textContent = "pause";
  timer = setInterval(() => {
    slider.value = Number(slider.value) + 1;
    show();
    if (slider.value === slider.max) stop();
  }, 1000 / Number(speed.value));
};
speed.onchange = () => { if (timer !== null) { stop(); play.onclick(); } };
slider.oninput = () => { stop(); show(); };
pick.onchange = () => { stop(); choose(pick.value); };
choose(0);
</script>
</body>
</html>
"""
