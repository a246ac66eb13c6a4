// Draws the points of lib/explorer/scatter.py as SVG; a click or an arrow key chooses one.
const W = 520, H = 340, LEFT = 56, RIGHT = 14, TOP = 14, BOTTOM = 46;

function make(name, attributes, parent, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

// About five round numbers between low and high.
function ticks(low, high) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) found.push(v);
  return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

function range(values) {
  const low = Math.min(...values), high = Math.max(...values);
  const room = (high - low || 1) * 0.04;
  return [low - room, high + room];
}

function scale([low, high], from, to) {
  return (value) => from + ((value - low) / (high - low)) * (to - from);
}

function axes(svg, x, y, xRange, yRange, model) {
  const across = ticks(...xRange), up = ticks(...yRange);
  for (const v of up.found) {
    make("line", { x1: LEFT, x2: W - RIGHT, y1: y(v), y2: y(v), class: "cx-grid" }, svg);
    make("text", { x: LEFT - 6, y: y(v) + 4, class: "cx-tick", "text-anchor": "end" }, svg, v.toFixed(up.digits));
  }
  for (const v of across.found) {
    make("text", { x: x(v), y: H - BOTTOM + 17, class: "cx-tick", "text-anchor": "middle" }, svg, v.toFixed(across.digits));
  }
  make("line", { x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM, class: "cx-axis" }, svg);
  make("text", { x: (LEFT + W - RIGHT) / 2, y: H - 8, class: "cx-name", "text-anchor": "middle" }, svg, model.get("x_label"));
  const turned = `translate(14 ${(TOP + H - BOTTOM) / 2}) rotate(-90)`;
  make("text", { transform: turned, class: "cx-name", "text-anchor": "middle" }, svg, model.get("y_label"));
}

function render({ model, el }) {
  let dots = [], order = [];

  function choose(index) {
    model.set("chosen", index);
    model.save_changes();
  }

  function highlight() {
    dots.forEach((dot, i) => dot.classList.toggle("cx-chosen", i === model.get("chosen")));
    const dot = dots[model.get("chosen")];
    if (dot) dot.parentNode.append(dot); // the chosen one is drawn last, above its neighbours
  }

  function draw() {
    const xs = model.get("xs"), ys = model.get("ys"), marked = model.get("marked");
    el.replaceChildren();
    dots = [];
    if (!xs.length) {
      el.textContent = "No candidate lies within these filters.";
      return;
    }
    const label = `Scatter of ${xs.length} candidates: ${model.get("y_label")} against ${model.get("x_label")}. Arrow keys go from point to point.`;
    const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, class: "cx-scatter", role: "application", tabindex: 0, "aria-label": label }, el);
    const xRange = range(xs), yRange = range(ys);
    const x = scale(xRange, LEFT, W - RIGHT), y = scale(yRange, H - BOTTOM, TOP);
    axes(svg, x, y, xRange, yRange, model);
    dots = xs.map((value, i) => {
      const dot = make("circle", { cx: x(value), cy: y(ys[i]), r: 4, class: marked[i] ? "cx-dot cx-won" : "cx-dot" }, svg);
      make("title", {}, dot, model.get("texts")[i]);
      dot.addEventListener("click", () => choose(i));
      return dot;
    });
    dots.forEach((dot, i) => marked[i] && svg.append(dot)); // the selected ones lie above the others
    order = xs.map((_, i) => i).sort((a, b) => xs[a] - xs[b] || ys[a] - ys[b]);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const now = order.indexOf(model.get("chosen"));
      choose(order[Math.min(order.length - 1, Math.max(0, now + step))]);
    });
    highlight();
  }

  model.on("change:xs change:ys change:marked change:texts change:x_label change:y_label", draw);
  model.on("change:chosen", highlight);
  draw();
}

export default { render };
