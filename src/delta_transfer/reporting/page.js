// Tables that sort by a click on a column's title: numbers by data-value, the rest by text.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
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

// Charts, each drawn when it comes near the screen: a page may have hundreds.
const charts = JSON.parse(document.getElementById("charts").textContent);
// Only buttons that stay on this page: plotly's own choice includes one that sends the chart to its makers' servers.
const settings = {
  responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
  showSendToCloud: false, plotlyServerURL: "",
};

function draw(div) {
  if (div.data) return;  // plotly keeps the traces there
  const {data, x, reference} = charts[div.id];
  const isCurve = data[0].type === "scatter", isMap = data[0].type === "heatmap";
  const names = isMap ? {type: "category", automargin: true} : {};  // also where a tap is called 1
  const together = isCurve && data.length <= 8;  // all lines in one box; of more, only the nearest one's
  if (isCurve && !together) data.forEach(line => { line.hovertemplate = `${x} %{x}: ${line.hovertemplate}`; });
  Plotly.newPlot(div, [...data.filter(line => line.customdata).map(band), ...data], {
    height: 260,
    margin: {l: 48, r: 12, t: 28, b: 40},  // above: room for the buttons
    font: {family: "system-ui, sans-serif", size: 12, color: "#222"},
    paper_bgcolor: "#fff",
    plot_bgcolor: "#fff",
    showlegend: false,
    hovermode: together ? "x unified" : "closest",
    bargap: 0,
    xaxis: {title: {text: x, standoff: 6}, unifiedhovertitle: {text: `${x} %{x}`}, gridcolor: "#e8e8e8", zeroline: false, ...names},
    yaxis: {gridcolor: "#e8e8e8", zeroline: false, rangemode: isCurve ? "normal" : "tozero", ...names, ...(isMap && {autorange: "reversed"})},
    shapes: reference === null ? [] : [
      {type: "line", x0: reference, x1: reference, yref: "paper", y0: 0, y1: 1, line: {width: 1, dash: "dash", color: "#222"}},
    ],
  }, settings);
}

// The area mean ± std behind a line.
function band(line) {
  const high = line.y.map((mean, i) => mean + line.customdata[i]);
  const low = line.y.map((mean, i) => mean - line.customdata[i]);
  return {
    type: "scatter", mode: "lines", x: [...line.x, ...[...line.x].reverse()], y: [...high, ...low.reverse()],
    fill: "toself", fillcolor: line.line.color, line: {width: 0}, opacity: 0.15 * line.opacity,
    legendgroup: line.legendgroup, hoverinfo: "skip",
  };
}

const places = [...document.querySelectorAll(".chart")];
const watch = new IntersectionObserver(
  seen => seen.filter(entry => entry.isIntersecting).forEach(entry => draw(entry.target)), {rootMargin: "300px"});
places.forEach(div => watch.observe(div));
window.addEventListener("beforeprint", () => places.filter(div => div.checkVisibility()).forEach(draw));

// A name in the legend hides and shows its line in all charts of its group.
for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    for (const div of button.closest(".group").querySelectorAll(".chart")) {
      draw(div);
      const lines = div.data.flatMap((line, i) => line.legendgroup === button.value ? [i] : []);
      if (lines.length) Plotly.restyle(div, {visible: shown}, lines);
    }
  });
}
