// On a narrow screen a cell stands below the one before it, and has the title of its column.
for (const table of document.querySelectorAll("table.sortable")) {
  const titles = [...table.tHead.rows[0].cells].map(head => head.textContent);
  for (const row of table.tBodies[0].rows) titles.forEach((title, i) => title && (row.cells[i].dataset.title = title));
}

// Tables that sort by a click on a column's title: numbers by data-value, the rest by text.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    closeRuns(table);
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => inOrder(a.cells[column], b.cells[column], sign));
    table.tBodies[0].append(...rows);
  }));
}

function inOrder(a, b, sign) {
  const [x, y] = [a.dataset.value, b.dataset.value];
  if (x !== undefined && y !== undefined) return sign * (x - y);
  if (x === undefined && y === undefined) return sign * a.textContent.localeCompare(b.textContent, "en", {numeric: true});
  return x === undefined ? 1 : -1;  // what has no number comes last in either order
}

// A choice of data set, backbone and method for the whole page, where there are several.
for (const table of document.querySelectorAll("table.filtered")) {
  const rows = [...table.tBodies[0].rows], chosen = new Map(), bar = document.createElement("p");
  const shown = names => [...chosen].every(([i, name]) => !name || names[i] === undefined || names[i] === name);
  const places = [...new Map(rows.map(row => [0, 1].map(i => rowText(row, i))).map(place => [place.join(), place])).values()];
  const blocks = [...document.querySelectorAll("#tables h3, .group > summary")].map(title => [title, places.find(
    place => `, ${title.textContent.replace(":", ",")},`.includes(`, ${place.join(", ")},`)) ?? []]);
  const methods = [...document.querySelectorAll("#tables table")].filter(one => rowText(one.tHead.rows[0], 0) === "method");
  const results = methods.flatMap(one => [...one.tBodies[0].rows]);
  bar.className = "filter";
  for (const column of [0, 1, 2]) {
    const names = [...new Set(rows.map(row => rowText(row, column)))];
    if (names.length < 2) continue;
    const select = document.createElement("select"), title = rowText(table.tHead.rows[0], column);
    select.append(new Option(`every ${title}`, ""), ...names.map(name => new Option(name, name)));
    select.setAttribute("aria-label", title);
    select.addEventListener("change", () => {
      chosen.set(column, select.value);
      closeRuns(table);
      for (const row of rows) row.hidden = !shown([0, 1, 2].map(i => rowText(row, i)));
      for (const row of results) row.hidden = !shown([, , rowText(row, 0)]);
      for (const [title, place] of blocks) for (const part of block(title)) part.hidden = !shown(place);
    });
    bar.append(select);
  }
  if (bar.children.length) document.querySelector("main").prepend(bar);
}

// A group of charts, or a table with its title and all that belongs to it.
function block(title) {
  if (title.tagName === "SUMMARY") return [title.parentElement];
  const parts = [title];
  for (let next = title.nextElementSibling; next && next.tagName !== "H3"; next = next.nextElementSibling) parts.push(next);
  return parts;
}

// A name in the legend hides and shows its line in all charts of its group.
for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    for (const line of button.closest(".group").querySelectorAll(`[data-key="${button.value}"]`)) {
      line.style.display = shown ? "" : "none";
    }
  });
}

// Runs that are ticked are drawn together, and a table says what differs in their settings. A run that is shown has a
// row of its own for how it was made and its curves.
const logs = JSON.parse(document.getElementById("logs")?.textContent ?? "null");
if (logs) {
  const table = document.querySelector("table.filtered"), ticked = new Set(), panel = make("div", {id: "compared"});
  const rows = [...table.tBodies[0].rows];
  table.parentElement.before(panel);
  table.tHead.rows[0].append(make("th", {scope: "col", class: "more"}, "how it was made"));
  rows.forEach((row, run) => {
    const box = make("input", {type: "checkbox"}), button = make("button", {type: "button", class: "show"}, "show");
    box.addEventListener("change", () => {
      ticked[box.checked ? "add" : "delete"](run);
      compare(panel, [...ticked].map(run => [run, `${rowText(rows[run], 2)}, seed ${rowText(rows[run], 4)}`]));
    });
    button.addEventListener("click", () => {
      if (row.nextElementSibling?.className === "made") return row.nextElementSibling.remove();
      row.after(make("tr", {class: "made"}, make("td", {colspan: row.cells.length}, howMade(run), charts([run]))));
    });
    row.append(make("td", {class: "more"}, make("label", {class: "tick"}, box, " compare"), button));
  });
}

function howMade(run) {
  const words = places => [places].flat().map(place => logs.texts[place]).join(" ");
  return make("dl", {}, ...logs.about.flatMap((name, i) => {
    const found = logs.made[run][i];
    return [make("dt", {}, name), make("dd", {}, found === null ? "not recorded" : words(found))];
  }));
}

function closeRuns(table) {
  table.querySelectorAll("tr.made").forEach(row => row.remove());
}

function rowText(row, column) {
  return row.cells[column].textContent;
}

function make(tag, attributes, ...children) {
  const drawn = ["svg", "path", "text", "polyline"].includes(tag);
  const space = (drawn ? document.createRange().createContextualFragment("<svg>").firstChild : document.body).namespaceURI;
  const made = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// runs: [place in the table, name]
function compare(panel, runs) {
  panel.replaceChildren();
  if (!runs.length) return;
  const places = runs.map(([place]) => place);
  const names = runs.map(([, name], i) => make("span", {}, dot(i), ` ${name}`));
  panel.append(make("h3", {}, "Compared runs"), make("p", {class: "legend"}, ...names), charts(places));
  if (runs.length < 2) return;
  const rows = logs.keys.flatMap(([key, values], i) => {
    const found = places.map(place => values[logs.settings[place][i]] ?? "\u2013");
    const cells = found.map((value, i) => make("td", {}, dot(i), ` ${value}`));
    return new Set(found).size > 1 ? [make("tr", {}, make("td", {}, key), ...cells)] : [];
  });
  const head = [make("th", {}, "differing settings"), ...names.map(name => make("th", {}, name.cloneNode(true)))];
  panel.append(make("div", {class: "scroll"}, make("table", {class: "differing"},
    make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows))));
}

function dot(i) {
  return make("span", {class: "run", style: `--hue: ${hue(i)}`}, "\u25cf");
}

function hue(i) {
  return Math.round(210 + 137.5 * i) % 360;  // neighbours are far apart on the wheel of colours
}

function charts(runs) {
  const drawn = Object.entries(logs.titles).flatMap(([name, title]) => {
    const lines = runs.map((run, i) => [hue(i), ...(logs.curves[run][name] ?? [])]).filter(line => line.length > 1);
    return lines.length ? [make("figure", {}, make("figcaption", {}, title), chart(title, lines))] : [];
  });
  return make("div", {class: "charts"}, ...drawn);
}

// As svg.py draws its charts. lines: [hue, number of the steps, values].
function chart(title, lines) {
  const [left, right, top, bottom] = [46, 346, 8, 194], values = lines.flatMap(line => line[2]);
  const log = Math.min(...values) > 0 && Math.max(...values) >= 100 * Math.min(...values);
  const scale = log ? Math.log10 : value => value;
  const ends = list => [Math.min(...list), Math.max(...list)];
  const [first, last] = ends(lines.flatMap(line => logs.steps[line[1]]));
  let [low, high] = ends(values.map(scale));
  const margin = 0.05 * (high - low) || 1;
  [low, high] = [low - margin, high + margin];
  const x = step => left + (right - left) * (step - first) / (last - first);
  const y = value => bottom - (bottom - top) * (scale(value) - low) / (high - low);
  const made = make("svg", {class: "chart", viewBox: "0 0 360 230", role: "img", "aria-label": title});
  for (const part of ticks(low, high)) {
    const value = log ? 10 ** part : part, at = y(value);
    made.append(make("path", {class: "grid", d: `M${left} ${at}H${right}`}));
    made.append(make("text", {x: left - 5, y: at + 4, "text-anchor": "end"}, String(+value.toPrecision(3))));
  }
  for (const step of ticks(first, last)) {
    made.append(make("text", {x: x(step), y: bottom + 15, "text-anchor": "middle"}, String(step)));
  }
  made.append(make("text", {x: 196, y: 225, "text-anchor": "middle"}, "iteration"));
  for (const [colour, steps, line] of lines) {
    const points = line.map((value, i) => `${x(logs.steps[steps][i]).toFixed(1)},${y(value).toFixed(1)}`);
    made.append(make("polyline", {class: "run", style: `--hue: ${colour}`, points: points.join(" ")}));
  }
  return made;
}

function ticks(low, high) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step / 1e6; tick += step) found.push(+tick.toPrecision(12));
  return found;
}

// Paper shows the charts that are folded up, too.
const folded = [...document.querySelectorAll("details.group:not([open])")];
window.addEventListener("beforeprint", () => folded.forEach(part => { part.open = true; }));
