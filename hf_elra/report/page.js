"use strict";
// Which drawing of a panel is shown, and what is under the pointer. Without JavaScript the first drawings are there.
const views = [...document.querySelectorAll(".view")];
const controls = document.querySelector(".controls");
const axis = document.getElementById("axis");
const log = document.getElementById("log");
controls.hidden = false;

function choose() {
  const scales = log.checked ? ["log", "linear"] : ["linear", "log"];
  for (const panel of document.querySelectorAll("figure")) {
    const own = views.filter(view => view.closest("figure") === panel);
    const on = own.filter(view => !view.dataset.axis || view.dataset.axis === axis.value);
    const shown = scales.map(scale => on.find(view => view.dataset.scale === scale)).find(Boolean) || own[0];
    for (const view of own) view.hidden = view !== shown;
  }
}
axis.addEventListener("change", choose);
log.addEventListener("change", choose);
choose();

function value(pixel, start, end, low, high, isLog) {
  const share = (pixel - start) / (end - start);
  return isLog ? Math.exp(Math.log(low) + share * (Math.log(high) - Math.log(low))) : low + share * (high - low);
}
function text(number) {
  const size = Math.abs(number);
  if (size >= 1e4) return Math.round(number).toLocaleString("en");
  return size && size < 1e-3 ? number.toExponential(2) : String(Number(number.toPrecision(4)));
}
function pointsOf(path) {
  if (path.pointsOf) return path.pointsOf;
  const points = [];
  let x = 0, y = 0;
  for (const [, letter, numbers] of path.getAttribute("d").matchAll(/([MLHV])([^MLHV]+)/g)) {
    const given = numbers.trim().split(/[ ,]+/).map(Number);
    if (letter === "H") x = given[0];
    else if (letter === "V") y = given[0];
    else [x, y] = given;
    points.push([x, y]);
  }
  return path.pointsOf = points;
}
const told = document.getElementById("told");
function tell(event) {
  const svg = event.target.closest ? event.target.closest("svg[data-scales]") : null;
  if (!svg) { told.hidden = true; return; }
  const box = svg.getBoundingClientRect();
  const at = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
  const [x0, x1, xLog, y0, y1, yLog] = svg.dataset.scales.split(" ").map(Number);
  const [left, right, top, bottom] = svg.dataset.plot.split(" ").map(Number);
  if (at < left || at > right) { told.hidden = true; return; }
  const lines = [`${svg.querySelector(".title").textContent} ${text(value(at, left, right, x0, x1, xLog))}`];
  for (const path of svg.querySelectorAll(".curve")) {
    let nearest = null;
    for (const point of pointsOf(path)) {
      if (!nearest || Math.abs(point[0] - at) < Math.abs(nearest[0] - at)) nearest = point;
    }
    if (nearest && Math.abs(nearest[0] - at) < 40) {
      lines.push(`${path.dataset.label}: ${text(value(nearest[1], bottom, top, y0, y1, yLog))}`);
    }
  }
  told.replaceChildren(...lines.map(line => Object.assign(document.createElement("div"), { textContent: line })));
  told.hidden = false;
  const onLeft = event.clientX > window.innerWidth / 2;
  told.style.left = onLeft ? "" : `${event.clientX + 14}px`;
  told.style.right = onLeft ? `${window.innerWidth - event.clientX + 14}px` : "";
  told.style.top = `${event.clientY + 14}px`;
}
document.addEventListener("pointermove", tell);
document.addEventListener("pointerleave", () => { told.hidden = true; });
document.documentElement.dataset.ready = "yes";
