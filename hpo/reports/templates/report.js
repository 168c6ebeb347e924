"use strict";
(() => {
  const report = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)");
  const plots = [...document.querySelectorAll(".plot")];
  const config = {
    displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: {format: "svg"},
  };
  let printing = false;

  // A figure as this page shows it now: by its width, and in the theme of the page or, on paper, in the light one.
  function shown(plot) {
    const {data, layout} = report.figures[plot.dataset.figure];
    const theme = dark.matches && !printing ? "dark" : "light";
    const width = printing ? 660 : plot.clientWidth;
    const template = {layout: structuredClone(report.themes[theme])};
    const now = {...structuredClone(layout), template, width: printing ? width : undefined, autosize: !printing};
    if (coarse.matches) now.dragmode = false; // a finger scrolls the page
    if (width < 560) {
      template.layout.font.size = 11;
      if (now.coloraxis) {
        Object.assign(now.coloraxis.colorbar, {orientation: "h", thickness: 10, yanchor: "bottom", y: 1.0, xpad: 0});
        now.coloraxis.colorbar.title.side = "top";
        now.margin = {...now.margin, r: 4};
      }
    }
    const lines = report.lines[theme];
    const traces = data.map((trace) => {
      const meta = trace.meta ?? {};
      if ("colour" in meta) return {...trace, line: {...trace.line, color: lines[meta.colour]}};
      return meta.labelled ? {...trace, text: trace.customdata.map((number) => report.labels[number])} : trace;
    });
    return [traces, now];
  }

  // Anew each time: of a colour bar that stood the other way, an update leaves parts behind.
  function draw(plot) {
    return Plotly.newPlot(plot, ...shown(plot), config);
  }

  // One after the other, so that the page can be scrolled meanwhile.
  async function drawAll() {
    for (const plot of plots) {
      await draw(plot);
      await new Promise((next) => setTimeout(next, 0));
    }
    document.documentElement.dataset.readyMs = performance.now().toFixed(0);
  }

  // The table in the page's column if it fits, else as wide as the window, else a card for each trial. On paper its
  // cells are broken over lines.
  const table = document.querySelector("#trials table");
  const heads = [...table.tHead.rows[0].cells];
  for (const row of table.tBodies[0].rows) {
    heads.forEach((head, column) => { row.cells[column].dataset.column = head.textContent; });
  }
  function fitTable() {
    const frame = table.parentElement;
    const isTooWide = () => !printing && table.offsetWidth > frame.clientWidth;
    table.classList.remove("cards");
    frame.classList.remove("wide");
    if (isTooWide()) frame.classList.add("wide");
    if (isTooWide()) table.classList.add("cards");
  }

  const redraw = () => plots.forEach(draw);
  let narrow = window.innerWidth < 640;
  dark.addEventListener("change", redraw);
  window.addEventListener("resize", () => {
    fitTable();
    if (narrow !== window.innerWidth < 640) {
      narrow = !narrow;
      redraw();
    }
  });
  for (const [name, value] of [["beforeprint", true], ["afterprint", false]]) {
    window.addEventListener(name, () => {
      printing = value;
      fitTable();
      redraw();
    });
  }

  // The table: a press on a column's name sorts by it, the next one the other way round; empty cells stay last.
  const body = table.tBodies[0];
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    return "key" in cell.dataset ? Number(cell.dataset.key) : cell.textContent;
  };
  function compare(a, b) {
    if (a === "" || b === "") return (a === "") - (b === "");
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), undefined, {numeric: true});
  }
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const rows = [...body.rows].map((row) => [keyOf(row, column), row]);
      rows.sort(([a], [b]) => (a === "" || b === "" ? compare(a, b) : sign * compare(a, b)));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      body.append(...rows.map(([, row]) => row));
    });
  });

  fitTable();
  drawAll();
})();
