"""The page of `run_page`: hand-written SVG, no requests, light and dark, mouse and keyboard."""

PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="@POLICY@">
<title>Runs</title>
<style>
:root { color-scheme: light dark; --ground: #fff; --ink: #1c2230; --soft: #667085;
  --line: #e4e7ec; --card: #fafbfc;
  --c0: #2563eb; --c1: #d9480f; --c2: #0f8a5f; --c3: #a02bc2; --c4: #b8860b; --c5: #0e8fa8; }
@media (prefers-color-scheme: dark) { :root { --ground: #11151c; --ink: #e6e9ef; --soft: #98a2b3;
  --line: #2a3140; --card: #171c26;
  --c0: #6ea0ff; --c1: #ff9466; --c2: #4fcf9f; --c3: #d98cf0; --c4: #e3bd55; --c5: #5fd0e6; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1.2rem; background: var(--ground); color: var(--ink);
  font: 14px/1.45 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .4rem 1rem;
  margin-bottom: .8rem; }
h1 { font-size: 1.15rem; margin: 0; }
#legend { display: flex; flex-wrap: wrap; gap: .3rem .9rem; flex: 1; }
#legend button { font: inherit; color: inherit; border: 0; background: none; padding: .1rem .2rem;
  cursor: pointer; display: flex; gap: .4rem; align-items: center; }
#legend button[aria-pressed=false] { opacity: .4; text-decoration: line-through; }
#legend i { width: 1rem; height: .25rem; border-radius: .2rem; }
#state { color: var(--soft); font-variant-numeric: tabular-nums; }
#panels { display: grid; grid-template-columns: repeat(4, 1fr); gap: .8rem; }
figure { margin: 0; padding: .7rem .8rem .5rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem; min-width: 0; }
figure:first-child { grid-column: 1 / -1; }
@media (max-width: 64rem) { #panels { grid-template-columns: 1fr 1fr; } }
@media (max-width: 36rem) { #panels { grid-template-columns: 1fr; } }
figcaption { font-weight: 600; display: flex; justify-content: space-between; gap: 1rem; }
figcaption small { font-weight: 400; color: var(--soft); }
.read { min-height: 1.4em; color: var(--soft); font-size: 12px;
  font-variant-numeric: tabular-nums; }
.read b { font-weight: 600; }
svg { display: block; width: 100%; height: auto; border-radius: .3rem; touch-action: none; }
svg text { fill: var(--soft); font-size: 11px; }
svg:focus-visible { outline: 2px solid var(--c0); }
.grid { stroke: var(--line); }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.raw { opacity: .3; stroke-width: 1; }
.base { stroke: var(--soft); stroke-dasharray: 5 4; }
.cross { stroke: var(--soft); opacity: .7; }
iframe { width: 100%; height: 36rem; border: 1px solid var(--line); border-radius: .6rem;
  margin-top: .8rem; background: var(--card); }
</style>
</head>
<body>
<main>
<header><h1>Runs</h1><div id="legend"></div><span id="state"></span></header>
<div id="panels"></div>
</main>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id), hidden = new Set();
const ones = values => values.map((_, number) => (number + .5) / 10);
const atStep = key => run => [{x: run.step, y: run[key], kind: "curve"}];
const PANELS = [
  {id: "loss", title: "training loss and validation bound", unit: "nats/token", wide: true,
    clip: true, series: run => [{x: run.step, y: run.loss, kind: "curve raw", name: "loss"},
      {x: run.step, y: run.smoothed, kind: "curve", name: "smoothed"},
      {x: run.valid.step, y: run.valid.nats, e: run.valid.stderr, kind: "dots",
        name: "validation"}]},
  {id: "grad_norm", title: "gradient norm", unit: "before clipping", log: true,
    series: atStep("grad_norm")},
  {id: "lr", title: "learning rate", unit: "", zero: true, series: atStep("lr")},
  {id: "tokens_per_second", title: "throughput", unit: "tokens/s", zero: true,
    series: atStep("tokens_per_second")},
  {id: "by_time", title: "validation by time t", unit: "nats/token", time: true,
    zero: true, series: run => {
      const all = run.by_time.nats, line = (values, kind, name) =>
        ({x: ones(values), y: values, kind, name});
      return all.length ? [line(all[0], "curve raw", "first"),
        line(all[all.length - 1], "curve", "last")] : [];
    }},
];

function make(name, attributes, parent, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

const color = number => `var(--c${number % 6})`;

function say(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e5) return Math.round(value).toLocaleString("en");
  if (size !== 0 && size < 1e-2) return value.toExponential(3);
  return String(Number(value.toPrecision(5)));
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return Number((value / 1e6).toPrecision(3)) + "M";
  if (size >= 1e3) return Number((value / 1e3).toPrecision(3)) + "k";
  if (size !== 0 && size < 1e-2) return value.toExponential(0).replace("e-", "e−");
  return String(Number(value.toPrecision(3)));
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(factor => factor * power >= rough) * power, found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + 1e-9 * step; at++)
    found.push(at * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const factor of high / low > 100 ? [1] : [1, 2, 5])
      if (factor * 10 ** power >= low && factor * 10 ** power <= high)
        found.push(factor * 10 ** power);
  return found;
}

function draw(panel) {
  const {svg, spec} = panel, width = spec.wide ? 1160 : 270, height = spec.wide ? 330 : 190;
  const box = {left: 46, right: width - 10, top: 10, bottom: height - 24};
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const lines = page.runs.flatMap((run, number) => hidden.has(run.name) ? [] :
    spec.series(run).map(line => ({...line, run, number})));
  const good = value => value !== null && (!spec.log || value > 0);
  const values = lines.flatMap(line => line.y.filter(good)).sort((a, b) => a - b);
  panel.lines = lines;
  if (!values.length) {
    make("text", {x: width / 2, y: height / 2, "text-anchor": "middle"}, svg, "nothing yet");
    return;
  }
  const bases = spec.id !== "loss" ? [] : [...new Set(page.runs.map(run => run.unigram))].filter(
    value => value !== null);
  // One bad step must not flatten the rest.
  const top = spec.clip ? values[Math.floor(.99 * (values.length - 1))] : values[values.length - 1];
  let low = spec.zero ? 0 : Math.min(values[0], ...bases), high = Math.max(top, ...bases);
  const f = spec.log ? Math.log10 : value => value, back = spec.log ? v => 10 ** v : v => v;
  const margin = .06 * (f(high) - f(low)) || .5 * Math.abs(f(high)) || .5;
  high = back(f(high) + margin);
  if (!spec.zero) low = back(f(low) - margin);
  const far = spec.time ? 1 : Math.max(1, ...lines.flatMap(line => line.x));
  const x = value => box.left + (box.right - box.left) * value / far;
  const y = value => box.bottom - (box.bottom - box.top) * (f(value) - f(low)) / (f(high) - f(low));
  Object.assign(panel, {x, y, far, box});
  for (const at of spec.log ? logTicks(low, high) : ticks(low, high, spec.wide ? 6 : 4)) {
    make("line", {class: "grid", x1: box.left, x2: box.right, y1: y(at), y2: y(at)}, svg);
    make("text", {x: box.left - 5, y: y(at) + 4, "text-anchor": "end"}, svg, short(at));
  }
  for (const at of ticks(0, far, spec.wide ? 10 : 4))
    make("text", {x: x(at), y: height - 8, "text-anchor": "middle"}, svg, short(at));
  for (const base of bases) {
    make("line", {class: "base", x1: box.left, x2: box.right, y1: y(base), y2: y(base)}, svg);
    make("text", {x: box.right - 4, y: y(base) - 5, "text-anchor": "end"}, svg,
      `unigram entropy of the validation text, ${base.toFixed(3)}`);
  }
  const clip = `clip-${spec.id}`, area = make("clipPath", {id: clip}, svg);
  make("rect", {x: box.left, y: box.top - 5, width: box.right - box.left + 6,
    height: box.bottom - box.top + 8}, area);
  const inner = make("g", {"clip-path": `url(#${clip})`}, svg);
  for (const line of lines) {
    const tag = {"data-run": line.run.name, "data-series": line.name || spec.id};
    if (line.kind === "dots") {
      line.x.forEach((step, k) => {
        if (line.y[k] === null) return;
        const error = line.e[k] || 0, at = x(step);
        const bar = make("g", {stroke: "var(--ink)", ...tag}, inner);
        for (const value of [line.y[k] - error, line.y[k] + error])
          make("line", {x1: at - 3, x2: at + 3, y1: y(value), y2: y(value)}, bar);
        make("line", {x1: at, x2: at, y1: y(line.y[k] - error), y2: y(line.y[k] + error)}, bar);
        make("circle", {cx: at, cy: y(line.y[k]), r: 4, fill: color(line.number)}, bar);
      });
      continue;
    }
    let path = "", pen = "M";
    line.y.forEach((value, k) => {
      if (!good(value)) { pen = "M"; return; }
      path += `${pen}${x(line.x[k]).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
    });
    make("path", {class: line.kind, d: path, stroke: color(line.number), ...tag}, inner);
  }
  panel.cross = make("line", {class: "cross", y1: box.top, y2: box.bottom, visibility: "hidden"},
    svg);
  point(panel, panel.at);
}

function nearest(xs, at) {
  let best = 0;
  xs.forEach((value, k) => { if (Math.abs(value - at) < Math.abs(xs[best] - at)) best = k; });
  return best;
}

function point(panel, at) {
  panel.at = at;
  if (at === undefined || !panel.cross) { panel.read.textContent = ""; return; }
  const {spec} = panel, main = panel.lines.find(line => line.x.length);
  if (!main) return;
  const place = main.x[nearest(main.x, at)];
  panel.cross.setAttribute("x1", panel.x(place));
  panel.cross.setAttribute("x2", panel.x(place));
  panel.cross.setAttribute("visibility", "visible");
  panel.read.replaceChildren(`${spec.time ? "t" : "step"} ${say(place)}`);
  for (const line of panel.lines) {
    if (!line.x.length) continue;
    const k = nearest(line.x, place), mark = document.createElement("b");
    const error = line.e && line.e[k] !== null ? ` ± ${say(line.e[k])} at ${line.x[k]}` : "";
    mark.style.color = color(line.number);
    mark.textContent = `  ${line.name || line.run.name} `;
    panel.read.append(mark, say(line.y[k]) + error);
  }
}

const panels = PANELS.map(spec => {
  const figure = document.createElement("figure");
  figure.innerHTML = "<figcaption><span></span><small></small></figcaption>" +
    '<div class="read" role="status"></div>';
  figure.querySelector("span").textContent = spec.title;
  figure.querySelector("small").textContent = spec.unit;
  const svg = make("svg", {id: spec.id, role: "img", tabindex: 0,
    "aria-label": `${spec.title}; arrow keys read values`}, figure);
  const panel = {spec, svg, read: figure.querySelector(".read")};
  const move = event => {
    if (!panel.box) return;
    const frame = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / frame.width;
    const {left, right} = panel.box, inside = (event.clientX - frame.left) * scale - left;
    point(panel, Math.max(0, Math.min(1, inside / (right - left))) * panel.far);
  };
  svg.onpointermove = move;
  svg.onpointerdown = move;
  svg.onkeydown = event => {
    const main = (panel.lines || []).find(line => line.x.length);
    const jump = {ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e9, End: 1e9};
    if (!main || !(event.key in jump)) return;
    event.preventDefault();
    const last = main.x.length - 1;
    const from = panel.at === undefined ? last : nearest(main.x, panel.at);
    point(panel, main.x[Math.max(0, Math.min(last, from + jump[event.key]))]);
  };
  get("panels").append(figure);
  return panel;
});

function drawAll() {
  document.title = page.runs.map(run => run.name).join(", ");
  get("legend").replaceChildren(...page.runs.map((run, number) => {
    const button = document.createElement("button"), mark = document.createElement("i");
    mark.style.background = color(number);
    button.append(mark, run.name);
    button.setAttribute("aria-pressed", !hidden.has(run.name));
    button.onclick = () => {
      hidden.has(run.name) ? hidden.delete(run.name) : hidden.add(run.name);
      drawAll();
    };
    return button;
  }));
  const last = Math.max(0, ...page.runs.flatMap(run => run.step.slice(-1)));
  get("state").textContent = `step ${last.toLocaleString("en")}`;
  panels.forEach(draw);
}

drawAll();
if (page.traces) {
  const frame = document.createElement("iframe");
  frame.title = "sample trajectories";
  frame.srcdoc = page.traces;
  get("panels").after(frame);
}
if (page.refresh) setInterval(async () => {
  try {
    const answer = await fetch("/data.json");
    if (answer.ok) { page.runs = (await answer.json()).runs; drawAll(); }
  } catch { get("state").textContent = "the server is gone"; }
}, 1000 * page.refresh);
</script>
</body>
</html>
"""
