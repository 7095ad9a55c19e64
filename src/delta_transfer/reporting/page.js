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

// Above the table of runs a choice of data set, backbone and method, where there are several.
for (const table of document.querySelectorAll("table.filtered")) {
  const rows = [...table.tBodies[0].rows], chosen = new Map(), bar = document.createElement("p");
  bar.className = "filter";
  for (const column of [0, 1, 2]) {
    const names = [...new Set(rows.map(row => row.cells[column].textContent))];
    if (names.length < 2) continue;
    const select = document.createElement("select");
    const title = table.tHead.rows[0].cells[column].textContent;
    select.append(new Option(`every ${title}`, ""), ...names.map(name => new Option(name, name)));
    select.setAttribute("aria-label", title);
    select.addEventListener("change", () => {
      chosen.set(column, select.value);
      for (const row of rows) row.hidden = [...chosen].some(([i, name]) => name && row.cells[i].textContent !== name);
    });
    bar.append(select);
  }
  table.parentElement.before(bar);
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

// Paper shows the charts that are folded up, too.
const folded = [...document.querySelectorAll("details.group:not([open])")];
window.addEventListener("beforeprint", () => folded.forEach(part => { part.open = true; }));
