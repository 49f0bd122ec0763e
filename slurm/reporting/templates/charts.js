"use strict";
// Draws the charts of the page, in its colors, and again when light becomes dark.
const specs = JSON.parse(document.getElementById("specs").textContent);
const darkness = matchMedia("(prefers-color-scheme: dark)");

function theme(width) {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const font = getComputedStyle(document.body).fontFamily;
  const words = { labelColor: color("--text"), titleColor: color("--quiet"), labelFont: font, titleFont: font, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
  const series = color("--series").split(" ");
  return {
    background: null, font, view: { stroke: null },
    axis: { ...words, domainColor: color("--line"), tickColor: color("--line"), gridColor: color("--grid") },
    legend: { ...words, columns: width < 480 ? 1 : 3 }, bar: { color: series[0] }, line: { color: series[0] }, point: { color: series[0] }, rect: { color: series[0] }, text: { color: color("--text") }, rule: { color: color("--quiet") },
    range: { category: series },
  };
}

async function drawChart(place, spec, description) {
  place.drawn?.finalize();
  const full = { description, ...spec };
  const tooltip = { theme: darkness.matches ? "dark" : "light" };
  place.drawn = await vegaEmbed(place, full, { mode: "vega-lite", renderer: "svg", actions: false, config: theme(place.clientWidth), tooltip });
  place.redraw = () => drawChart(place, spec, description);
}

for (const place of document.querySelectorAll("[data-chart]")) {
  drawChart(place, specs[place.dataset.chart], place.parentElement.querySelector("figcaption").textContent.trim());
}
darkness.addEventListener("change", () => document.querySelectorAll(".chart").forEach((place) => place.redraw?.()));
