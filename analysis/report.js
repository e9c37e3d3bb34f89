// Draws the charts of a report and their tables; all text reaches the page as text, never as markup.
"use strict";
(() => {
  const { specs, themes } = JSON.parse(document.getElementById("data").textContent);
  for (const { datasets } of specs) {
    for (const [name, { columns, rows }] of Object.entries(datasets)) {
      datasets[name] = rows.map((row) => Object.fromEntries(columns.map((column, at) => [column, row[at]])));
    }
  }
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const picker = document.getElementById("layer");
  const views = [];

  // The marks that carry a chart's numbers: its own, or those of its first layer.
  const rowsOf = (kind, spec) => {
    const { name } = spec.data ?? spec.layer[0].data;
    const rows = spec.datasets[name];
    return kind === "tokens" ? rows.filter((row) => row.layer === Number(picker.value)) : rows;
  };

  const element = (tag, text) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    return node;
  };

  const fillTable = (figure, rows) => {
    const table = figure.querySelector(".numbers table");
    const names = rows.length ? Object.keys(rows[0]) : [];
    const head = element("thead");
    head.append(element("tr"));
    head.firstChild.append(...names.map((name) => {
      const cell = element("th", name.replaceAll("_", " "));
      cell.scope = "col";
      return cell;
    }));
    const body = element("tbody");
    body.append(...rows.map((row) => {
      const line = element("tr");
      line.append(...names.map((name) => element("td", row[name] ?? "–")));
      return line;
    }));
    table.replaceChildren(head, body);
  };

  // The count of a chart's rows, and its table while that is open.
  const showNumbers = (figure) => {
    const { kind, number } = figure.dataset;
    const rows = rowsOf(kind, specs[number]);
    figure.querySelector(".numbers summary").textContent = `The numbers (${rows.length} rows)`;
    if (figure.querySelector(".numbers").open) fillTable(figure, rows);
  };

  // A value of CSV: quoted where it must be, and never a formula to a spreadsheet.
  const csvValue = (value) => {
    const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value ?? "");
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };

  const save = async (figure, form, view) => {
    const { kind, number } = figure.dataset;
    const rows = rowsOf(kind, specs[number]);
    const link = element("a");
    link.download = `${figure.dataset.name.replaceAll(/[^A-Za-z0-9._-]+/g, "-")}.${form}`;
    if (form === "csv") {
      const lines = [Object.keys(rows[0] ?? {}), ...rows.map(Object.values)].map((line) => line.map(csvValue).join(","));
      link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
    } else {
      link.href = await view.toImageURL(form, form === "png" ? 3 : 1);
    }
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // a busy browser fetches it later than the click
  };

  const draw = async (figure) => {
    const { kind, number } = figure.dataset;
    const spec = specs[number];
    const options = {
      ast: true, // expressions are interpreted: the page's policy allows no code from text
      renderer: "svg",
      config: themes[dark.matches ? "dark" : "light"],
      actions: false, // each figure has buttons
    };
    const { view } = await vegaEmbed(figure.querySelector(".chart"), spec, options);
    if (kind === "tokens") {
      views.push(view);
      await view.signal("layer", Number(picker.value)).runAsync();
    }
    for (const button of figure.querySelectorAll("[data-save]")) {
      button.onclick = async () => save(figure, button.dataset.save, view);
    }
    figure.querySelector(".numbers").ontoggle = () => showNumbers(figure);
    showNumbers(figure);
    figure.dataset.drawn = "";
  };

  const drawAll = async () => {
    for (const view of views.splice(0)) view.finalize();
    for (const figure of document.querySelectorAll("figure[data-kind]")) await draw(figure);
    document.body.dataset.drawn = "";
  };

  picker.addEventListener("change", async () => {
    await Promise.all(views.map((view) => view.signal("layer", Number(picker.value)).runAsync()));
    document.querySelectorAll("figure[data-kind=tokens]").forEach(showNumbers);
  });
  dark.addEventListener("change", drawAll);
  drawAll();
})();
