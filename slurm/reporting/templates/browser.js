"use strict";
// The table of features, and a feature's own page at #feature-7. All text goes in as text, never as HTML.
(() => {
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const index = read("index"), inside = read("inside"), beside = read("beside");
const layers = index.layers, numFeatures = index.features, ROWS = 50;
const dead = new Set(index.dead), dense = new Set(index.dense);
const table = document.getElementById("table"), article = document.getElementById("feature");
const search = document.getElementById("search"), filter = document.getElementById("filter"), more = document.getElementById("more");

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}
const number = (value) => value === 0 ? "0" : Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
const percent = (value) => `${number(100 * value)} %`;
const of = (columns, feature) => columns.map((column) => column[feature]);
const shares = (columns, feature) => {
  const values = of(columns, feature), most = Math.max(...values);
  return layers.length <= 3 ? values.map((value) => value.toFixed(2)).join(" / ") : `${layers[values.indexOf(most)]} ${most.toFixed(2)}`;
};
const token = (text) => element("span", { className: "token", textContent: text });
// Alone, a token of blanks would look like nothing, or like a gap.
const chip = (text) => token(text.replace(/ {3,}/g, (blanks) => `·×${blanks.length}`).replaceAll(" ", "·"));
const tokens = (texts) => element("span", { className: "tokens" }, ...texts.map(chip));
const kind = (feature) => dead.has(feature) ? "silent" : dense.has(feature) ? "dense" : "";
const link = (feature, text = String(feature)) => element("a", { href: `#feature-${feature}`, textContent: text });

// -- the table ------------------------------------------------------------------------------------------------------

const columns = [
  { name: "feature", key: (f) => f, isRising: true, cell: (f) => link(f) },
  { name: "density", key: (f) => index.density[f], cell: (f) => percent(index.density[f]) },
  { name: "max", key: (f) => index.max[f], cell: (f) => number(index.max[f]) },
  { name: "mean", key: (f) => index.mean[f], cell: (f) => number(index.mean[f]) },
  { name: "norm share", key: (f) => Math.max(...of(index.norms, f)), cell: (f) => shares(index.norms, f) },
  { name: "alone", key: (f) => Math.min(...of(index.alone, f)), cell: (f) => shares(index.alone, f) },
  ...(index.cosine ? [{ name: "cosine", key: (f) => index.cosine[f], isRising: true, cell: (f) => index.cosine[f].toFixed(2) }] : []),
  { name: "", cell: (f) => kind(f) },
  { name: "strongest on", cell: (f) => tokens(index.top[f]) },
];
const MOSTLY = 0.8;
const filters = [
  ["all features", () => true],
  ["neither silent nor dense", (f) => !kind(f)],
  ["dense", (f) => dense.has(f)],
  ["silent here", (f) => dead.has(f)],
  ["shared: no layer over 0.8 of the norm", (f) => !dead.has(f) && Math.max(...of(index.norms, f)) <= MOSTLY],
  ...layers.map((layer, number) => [`mostly of ${layer}: over 0.8 of the norm`, (f) => index.norms[number][f] > MOSTLY]),
];
filters.forEach(([name], place) => filter.append(element("option", { value: place, textContent: name })));
filter.value = 1;

let sorted = columns[2], isRising = false, chosen = [], numShown = ROWS, isCut = false;

function choose() {
  const wanted = search.value.trim().toLowerCase(), keep = filters[Number(filter.value)][1];
  const holds = (texts) => texts.some((text) => text.toLowerCase().includes(wanted));
  chosen = [];
  for (let f = 0; f < index.density.length; f++) {
    if (keep(f) && (!wanted || String(f) === wanted || holds(index.top[f]) || holds(index.promoted[f]))) chosen.push(f);
  }
  const sign = isRising ? 1 : -1;
  chosen.sort((a, b) => sign * (sorted.key(a) - sorted.key(b)) || a - b);
  show();
}

function show() {
  const rows = chosen.slice(0, numShown).map((f) => element("tr", {}, ...columns.map((column) => element("td", { className: column.key ? "number" : "" }, column.cell(f)))));
  table.tBodies[0].replaceChildren(...rows);
  const heads = columns.map((column) => {
    const head = element("th", { scope: "col", className: column.key ? "number" : "" });
    if (!column.key) return head.append(column.name), head;
    if (column === sorted) head.setAttribute("aria-sort", isRising ? "ascending" : "descending");
    const button = element("button", { type: "button", textContent: column.name + (column === sorted ? (isRising ? " ↑" : " ↓") : "") });
    button.addEventListener("click", () => {
      isRising = column === sorted ? !isRising : Boolean(column.isRising);
      sorted = column;
      choose();
      [...table.tHead.querySelectorAll("button")].find((other) => other.textContent.startsWith(column.name))?.focus();
    });
    head.append(button);
    return head;
  });
  table.tHead.replaceChildren(element("tr", {}, ...heads));
  const shown = Math.min(numShown, chosen.length);
  document.getElementById("count").textContent = `${chosen.length.toLocaleString("en")} of ${numFeatures.toLocaleString("en")} features; ${shown.toLocaleString("en")} shown${isCut ? `; those from ${index.density.length.toLocaleString("en")} on are in files that are not beside this page` : ""}`;
  more.hidden = shown === chosen.length;
}

const again = () => { numShown = ROWS; choose(); };
search.addEventListener("input", again);
filter.addEventListener("change", again);
more.addEventListener("click", () => { numShown += ROWS; show(); });
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());

// -- one feature ------------------------------------------------------------------------------------------------------

const parts = new Map();
const waiting = new Map();
globalThis.crosscoderPart = (data, place, part) => { if (data === beside.data) waiting.get(place)?.(part); };

function runFile(name, missing) {
  const script = element("script", { src: `${beside.folder}/${name}.js`, onerror: missing });
  document.head.append(script);
}

// The index of very many features goes on in files beside the page; each brings the next in.
globalThis.crosscoderIndex = (data, place, more) => {
  if (data !== beside.data) return;
  const longer = (column, added) => { for (const value of added) column.push(value); };
  for (const name of ["density", "max", "mean", "top", "promoted", ...(index.cosine ? ["cosine"] : [])]) longer(index[name], more[name]);
  for (const name of ["norms", "alone"]) index[name].forEach((column, layer) => longer(column, more[name][layer]));
  more.dead.forEach((feature) => dead.add(feature));
  more.dense.forEach((feature) => dense.add(feature));
  choose();
  loadIndex(place + 1);
};
function loadIndex(place) {
  if (place * beside.features_an_index < numFeatures) runFile(`index-${place}`, () => { isCut = true; show(); });
  else open();
}
function load(feature) {
  if (inside.features[feature]) return Promise.resolve(inside);
  const place = Math.floor(feature / beside.features_a_part);
  if (!parts.has(place)) {
    const name = String(place).padStart(5, "0");
    parts.set(place, new Promise((done, fail) => {
      waiting.set(place, done);
      runFile(name, () => {
        parts.delete(place);
        fail(new Error(`The page keeps this feature in ${decodeURI(beside.folder)}/${name}.js, which is not beside it: copy that folder along with the page.`));
      });
    }));
  }
  return parts.get(place);
}

function contextLine([quantile, documentNumber, position, peak, activation, places, levels], names, greatest) {
  const line = element("li", {}, element("span", { className: "where", textContent: `${number(activation)} · document ${documentNumber}, position ${position}` }));
  places.forEach((place, at) => {
    const span = token(names[place]);
    if (levels[at] > 0) {
      span.style.background = `rgba(var(--mark), ${(0.12 + 0.68 * levels[at] / 1000).toFixed(2)})`;
      span.title = `activation ${number(greatest * levels[at] / 1000)}`;
    }
    if (at === peak) span.classList.add("peak");
    line.append(span);
  });
  return line;
}

function contexts(detail, names, greatest) {
  const groups = new Map();
  for (const context of detail.contexts) groups.set(context[0], [...(groups.get(context[0]) ?? []), context]);
  const last = Math.max(...[...groups.keys()].map((quantile) => quantile ?? 0));
  return [...groups].map(([quantile, members]) => [
    element("h4", { textContent: quantile === null ? "Strongest firings" : `From a random sample, group ${quantile + 1} of ${last + 1} from the weakest` }),
    element("ol", { className: "contexts" }, ...members.map((context) => contextLine(context, names, greatest))),
  ]);
}

function layerTable(feature, detail) {
  const head = ["layer", "decoder norm", "share", "fires on it alone", "activation lost without it", "promotes", "suppresses"];
  const lens = (pairs) => element("span", { className: "tokens" }, ...(pairs ?? []).map(([text, logit]) => Object.assign(chip(text), { title: `logit ${number(logit)}` })));
  const rows = layers.map((layer, place) => element("tr", {},
    element("th", { scope: "row", textContent: layer }),
    ...[number(detail.decoder_norms[place]), index.norms[place][feature].toFixed(3), percent(index.alone[place][feature]), percent(detail.drop_by_layer[place])]
      .map((text) => element("td", { className: "number", textContent: text })),
    element("td", {}, lens(detail.promoted[place])), element("td", {}, lens(detail.suppressed[place]))));
  const heads = head.map((text, place) => element("th", { scope: "col", className: place > 0 && place < 5 ? "number" : "", textContent: text }));
  const region = element("div", { className: "scroll", tabIndex: 0 }, element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows)));
  region.setAttribute("role", "region");
  region.setAttribute("aria-label", `Layers of feature ${feature}`);
  return region;
}

function profile(feature, detail) {
  const place = element("div", { className: "chart" });
  const measures = { "share of the decoder norms": (l) => index.norms[l][feature], "firings left, encoded alone": (l) => index.alone[l][feature], "activation lost without it": (l) => detail.drop_by_layer[l] };
  const values = Object.entries(measures).flatMap(([measure, value]) => layers.map((layer, l) => ({ layer, measure, value: value(l) })));
  queueMicrotask(() => drawChart(place, { ...specs.profile, data: { values } }, `Layer profile of feature ${feature}`));
  return place;
}

function fill(feature, part) {
  const detail = part.features[feature], at = chosen.indexOf(feature);
  const steps = element("p", { className: "steps" });
  if (at > 0) steps.append(link(chosen[at - 1], `← previous: ${chosen[at - 1]}`));
  if (at >= 0 && at + 1 < chosen.length) steps.append(link(chosen[at + 1], `next: ${chosen[at + 1]} →`));
  steps.append(element("a", { href: "#browser", textContent: "back to the table" }));
  const heading = element("h3", { textContent: `Feature ${feature}`, tabIndex: -1 });
  const what = kind(feature) ? ` (${kind(feature)})` : "";
  const facts = element("p", { textContent: `Fires on ${percent(index.density[feature])} of ${index.positions.toLocaleString("en")} positions${what}; activation ${number(index.mean[feature])} on average, ${number(index.max[feature])} at most.` });
  const near = element("p", {}, "Nearest by decoder (cosine): ");
  detail.neighbors.forEach((other, place) => near.append(place ? ", " : "", link(other), ` (${detail.neighbor_cosines[place].toFixed(2)})`));
  const cosines = detail.layer_cosines.length ? [element("p", { textContent: `Cosine between the layers' decoders: ${detail.layer_cosines.map((value) => value.toFixed(2)).join(", ")}.` })] : [];
  const [strongest, ...sample] = contexts(detail, part.tokens, index.max[feature]);
  article.replaceChildren(steps, heading, facts, near, ...(strongest ?? []), element("h4", { textContent: "Layers" }), layerTable(feature, detail), ...cosines,
    profile(feature, detail), ...sample.flat());
  return heading;
}

async function open() {
  const match = /^#feature-(\d+)$/.exec(location.hash);
  article.hidden = !match;
  if (!match) return;
  const feature = Number(match[1]);
  const message = (text) => article.replaceChildren(element("p", { className: "notice", textContent: text }));
  if (feature >= index.density.length && feature < numFeatures) return message("The index of features is still being read.");
  if (feature >= numFeatures) return message(`There is no feature ${feature}: they are numbered 0 to ${numFeatures - 1}.`);
  try {
    const part = await load(feature);
    if (location.hash !== match[0]) return;
    const heading = fill(feature, part);
    article.scrollIntoView();
    heading.focus({ preventScroll: true });
  } catch (error) {
    message(error.message);
  }
}

choose();
addEventListener("hashchange", open);
loadIndex(1);
})();
