// Draws the charts of a report and their tables; all text reaches the page as text, never as markup.
"use strict";
(() => {
  const { figures, themes } = JSON.parse(document.getElementById("data").textContent);

  // Columns as `analysis.report.page` packs them: as they are, texts that are told once, or runs of equal steps.
  const column = (packed) => {
    if (Array.isArray(packed)) return packed;
    if ("texts" in packed) return column(packed.places).map((place) => packed.texts[place]);
    let value = 0;
    return packed.steps.flatMap(([step, count]) => Array.from({ length: count }, () => (value += step)));
  };
  for (const { tables } of figures) {
    for (const [name, packed] of Object.entries(tables)) {
      const columns = Object.entries(packed).map(([key, values]) => [key, column(values)]);
      const count = columns.length ? columns[0][1].length : 0;
      tables[name] = Array.from({ length: count }, (_, at) => Object.fromEntries(columns.map(([key, values]) => [key, values[at]])));
    }
  }
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const picker = document.getElementById("layer");
  const drawn = new Map(); // figure to what Vega made of it

  // What is chosen of a figure's rows: the value of its field `by`.
  const chosen = (figure) => (figure.dataset.kind === "tokens" ? Number(picker.value) : Number(figure.dataset.value ?? 0));

  const chosenRows = ({ by }, value, rows) => {
    if (by === null) return rows;
    return rows.filter((row) => row[by] === undefined || row[by] === value).map(({ [by]: _, ...rest }) => rest);
  };

  // Lines of at most so many characters; one word that is longer stays whole.
  const wrapped = (lines, most) => [lines].flat().flatMap((line) =>
    line.split(" ").reduce((made, word) => {
      const longer = made.length ? `${made.at(-1)} ${word}` : word;
      return made.length && longer.length <= most ? [...made.slice(0, -1), longer] : [...made, word];
    }, []));

  // The chart with the rows that are chosen, as `analysis.report.figures.Figure.shown` makes it, and titles that fit.
  const shown = (figure) => {
    const { spec, tables, by, options } = figures[figure.dataset.number];
    const value = chosen(figure);
    const named = Object.entries(tables).map(([name, rows]) => [name, chosenRows({ by }, value, rows)]);
    const room = figure.querySelector(".chart").clientWidth - 50; // pixels; what follows are those of a character
    const text = wrapped(spec.title.text, room / 7.7);
    const subtitle = wrapped(options[value]?.subtitle ?? spec.title.subtitle, room / 6.3);
    return { ...spec, title: { ...spec.title, text, subtitle }, datasets: Object.fromEntries(named) };
  };

  // The numbers of the marks that carry them: the first table.
  const rowsOf = (figure) => {
    const { tables, by, options } = figures[figure.dataset.number];
    const value = chosen(figure);
    const rows = chosenRows({ by }, value, Object.values(tables)[0]);
    return by === null ? rows : rows.map((row) => ({ ...options[value]?.row, ...row }));
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
    const rows = rowsOf(figure);
    figure.querySelector(".numbers summary").textContent = `The numbers (${rows.length} rows)`;
    if (figure.querySelector(".numbers").open) fillTable(figure, rows);
  };

  // A value of CSV: quoted where it must be, and never a formula to a spreadsheet.
  const csvValue = (value) => {
    const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value ?? "");
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };

  const csv = (rows) => {
    const lines = [Object.keys(rows[0] ?? {}), ...rows.map(Object.values)];
    return new Blob([lines.map((line) => `${line.map(csvValue).join(",")}\n`).join("")], { type: "text/csv" });
  };

  const save = async (figure, form) => {
    const { by, options } = figures[figure.dataset.number];
    const name = [figure.dataset.name, ...(by === null ? [] : [options[chosen(figure)]?.name ?? ""])].join("-");
    const link = element("a");
    link.download = `${name.replaceAll(/[^A-Za-z0-9._-]+/g, "-")}.${form}`;
    if (form === "csv") link.href = URL.createObjectURL(csv(rowsOf(figure)));
    else link.href = await drawn.get(figure).view.toImageURL(form, form === "png" ? 3 : 1);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // a busy browser fetches it later than the click
  };

  const draw = async (figure) => {
    const options = {
      ast: true, // expressions are interpreted: the page's policy allows no code from text
      renderer: "svg",
      config: themes[dark.matches ? "dark" : "light"],
      actions: false, // each figure has buttons
    };
    drawn.get(figure)?.finalize();
    drawn.set(figure, await vegaEmbed(figure.querySelector(".chart"), shown(figure), options));
    showNumbers(figure);
    figure.dataset.drawn = "";
  };

  // One after the other, so that the first are seen while the last are drawn.
  const drawEach = async (some) => {
    for (const figure of some) await draw(figure);
  };

  // A figure that has options of its own: groups, and the options of a group that hold what is typed.
  const wire = (figure) => {
    const { options } = figures[figure.dataset.number];
    const [group, typed, list] = ["group", "typed", "value"].map((part) => figure.querySelector(`[data-choose=${part}]`));
    const listed = [...list.options];
    const narrow = () => {
      const text = typed.value.toLowerCase();
      const own = listed.filter((option) => option.dataset.group === group.value);
      list.replaceChildren(...own.filter((option, at) => at === 0 || option.textContent.toLowerCase().includes(text)));
    };
    const show = async (value) => {
      figure.dataset.value = list.value = value;
      figure.querySelector("figcaption").textContent = options[value].caption;
      await draw(figure);
    };
    group.addEventListener("change", async () => {
      typed.value = "";
      narrow();
      await show(list.options[0].value);
    });
    typed.addEventListener("input", narrow);
    typed.addEventListener("keydown", async ({ key }) => {
      if (key === "Enter" && list.options.length > 1) await show(list.options[1].value); // the first that fits
    });
    list.addEventListener("change", async () => show(list.value));
    narrow();
    list.selectedIndex = 0;
  };

  const all = [...document.querySelectorAll("figure[data-kind]")];
  for (const figure of all) {
    for (const button of figure.querySelectorAll("[data-save]")) button.onclick = async () => save(figure, button.dataset.save);
    figure.querySelector(".numbers").ontoggle = () => showNumbers(figure);
    if (figure.querySelector("[data-choose]")) wire(figure);
  }
  picker.addEventListener("change", async () => drawEach(all.filter((figure) => figure.dataset.kind === "tokens")));
  dark.addEventListener("change", async () => drawEach(all));
  drawEach(all).then(() => {
    document.body.dataset.drawn = "";
  });
})();
