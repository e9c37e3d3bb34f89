// Draws the charts of a report and their tables. All text is inserted as text, never as markup.
"use strict";
(() => {
  const { figures, themes } = JSON.parse(document.getElementById("data").textContent);

  // Columns as packed by `analysis.report.page`: unchanged, as texts stored once, or as runs of equal steps.
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
  const drawn = new Map(); // figure to its Vega view

  // The selection of a figure's rows: a value of its field `by`.
  const chosen = (figure) => (figure.dataset.kind === "tokens" ? Number(picker.value) : Number(figure.dataset.value ?? 0));

  const chosenRows = ({ by }, value, rows) => {
    if (by === null) return rows;
    return rows.filter((row) => row[by] === undefined || row[by] === value).map(({ [by]: _, ...rest }) => rest);
  };

  // Lines of at most so many characters; a longer word is not broken.
  const wrapped = (lines, most) => [lines].flat().flatMap((line) =>
    line.split(" ").reduce((made, word) => {
      const longer = made.length ? `${made.at(-1)} ${word}` : word;
      return made.length && longer.length <= most ? [...made.slice(0, -1), longer] : [...made, word];
    }, []));

  const subtitleOf = ({ spec, options }, value) => options[value]?.subtitle ?? spec.title.subtitle;

  // The chart with the selected rows, as made by `analysis.report.figures.Figure.shown`; on the page, its title
  // is that of the card, and as many ranks of tokens are shown as fit.
  const shown = (figure, { title: _, ...spec }, rows) => {
    const ranks = Math.max(2, Math.floor((figure.querySelector(".chart").clientWidth - 50) / 60));
    const named = Object.entries(rows).map(([name, all]) => [name, all.filter(({ rank = 0 }) => rank <= ranks)]);
    return { ...spec, datasets: Object.fromEntries(named) };
  };

  // The same with its title, wrapped to fit, for files and the clipboard.
  const titled = (spec, subtitle, datasets, width) => {
    const title = {
      ...spec.title,
      text: wrapped(spec.title.text, (width - 50) / 7.7), // pixels per character
      subtitle: wrapped(subtitle, (width - 50) / 6.3),
    };
    return { ...spec, title, width, datasets };
  };

  const tablesOf = ({ tables, by }, value) =>
    Object.fromEntries(Object.entries(tables).map(([name, rows]) => [name, chosenRows({ by }, value, rows)]));

  // The numbers behind the marks: the first table.
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
    const table = figure.querySelector(".menu table");
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

  // The number of a chart's rows, and its table while open.
  const showNumbers = (figure) => {
    const rows = rowsOf(figure);
    figure.querySelector(".count").textContent = `Numbers (${rows.length} rows)`;
    if (figure.querySelector(".menu").matches(":popover-open")) fillTable(figure, rows);
  };

  // A CSV value: quoted where necessary, and never read as a formula by a spreadsheet.
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
    else link.href = await picture(figure, Number(figure.dataset.number), chosen(figure), form);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // a busy browser fetches it some time after the click
  };

  const embed = async (where, spec, theme) => vegaEmbed(where, spec, {
    ast: true, // expressions are interpreted, because the page's policy forbids evaluating text as code
    renderer: "svg",
    config: theme,
    actions: false, // each figure has a menu
  });

  const current = () => themes[dark.matches ? "dark" : "light"];

  // A chart with its title, as the URL of an image.
  const picture = async (figure, number, value, form, theme = current()) => {
    const { spec } = figures[number];
    const width = figure.querySelector(".chart").clientWidth;
    const whole = titled(spec, subtitleOf(figures[number], value), tablesOf(figures[number], value), width);
    const made = await embed(element("div"), whole, theme);
    const image = await made.view.toImageURL(form, form === "png" ? 3 : 1);
    made.finalize();
    return image;
  };

  const draw = async (figure) => {
    const number = figure.dataset.number ?? figure.dataset.picture;
    const value = chosen(figure);
    const spec = shown(figure, figures[number].spec, tablesOf(figures[number], value));
    drawn.get(figure)?.finalize();
    drawn.set(figure, await embed(figure.querySelector(".chart"), spec, current()));
    figure.querySelector("figcaption .soft").textContent = subtitleOf(figures[number], value).join("; ");
    if (figure.dataset.number) showNumbers(figure);
    figure.dataset.drawn = "";
  };

  // One after the other, so that the first are visible while the last are drawn.
  const drawEach = async (some) => {
    for (const figure of some) await draw(figure);
  };

  // A figure with its own options: groups, and the options of a group that contain the typed text.
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
      figure.querySelector("figcaption .of").textContent = options[value].caption;
      await draw(figure);
    };
    group.addEventListener("change", async () => {
      typed.value = "";
      narrow();
      await show(list.options[0].value);
    });
    typed.addEventListener("input", narrow);
    typed.addEventListener("keydown", async ({ key }) => {
      if (key === "Enter" && list.options.length > 1) await show(list.options[1].value); // the first match
    });
    list.addEventListener("change", async () => show(list.value));
    narrow();
    list.selectedIndex = 0;
  };

  // The summary as text and, where the target accepts it, with its picture on white.
  const copySummary = async () => {
    const parts = [...document.querySelectorAll(".said > p, .said > pre")].filter((part) => !part.querySelector("button"));
    const text = parts.map((part) => part.textContent).join("\n\n");
    const html = async () => {
      const shownIn = document.querySelector("[data-picture]");
      const made = element("div");
      for (const part of parts) made.append(element(part.tagName, part.textContent));
      if (shownIn) {
        const image = element("img");
        image.src = await picture(shownIn, Number(shownIn.dataset.picture), 0, "png", { ...themes.light, background: "white" });
        made.lastChild.before(image);
      }
      return new Blob([made.innerHTML], { type: "text/html" });
    };
    await navigator.clipboard.write([
      new ClipboardItem({ "text/plain": new Blob([text], { type: "text/plain" }), "text/html": html() }),
    ]);
  };

  // Reports what was copied; if the browser does not allow copying, selects the text instead.
  const copying = async (copy, source, told) => {
    try {
      await copy();
      told("Copied");
    } catch {
      getSelection().selectAllChildren(source);
      told("Selected: press Ctrl-C to copy");
    }
  };

  const say = (text) => (document.getElementById("copied").textContent = text);
  document.getElementById("copy").onclick = async () => copying(copySummary, document.querySelector(".said"), say);
  for (const button of document.querySelectorAll("[data-copy]")) {
    const told = (text) => (button.textContent = text);
    button.onclick = async () =>
      copying(async () => navigator.clipboard.writeText(button.dataset.copy), button.previousElementSibling, told);
  }

  // The contents mark the section being read.
  const linked = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
  const sections = [...document.querySelectorAll("main > section")];
  const mark = () => {
    const read = sections.findLast((section) => section.getBoundingClientRect().top < innerHeight / 3) ?? sections[0];
    for (const [id, link] of linked) {
      if (id === read.getAttribute("aria-labelledby")) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  };
  addEventListener("scroll", mark, { passive: true });
  mark();

  const all = [...document.querySelectorAll("figure[data-picture], figure[data-kind]")];
  for (const figure of all.filter((one) => one.dataset.kind)) {
    for (const button of figure.querySelectorAll("[data-save]")) button.onclick = async () => save(figure, button.dataset.save);
    figure.querySelector(".menu").addEventListener("toggle", () => showNumbers(figure));
    if (figure.querySelector("[data-choose]")) wire(figure);
  }
  const drawTokens = async () => drawEach(all.filter((figure) => figure.dataset.kind === "tokens"));
  picker.addEventListener("change", drawTokens);
  for (const link of document.querySelectorAll("[data-layer]")) {
    link.addEventListener("click", async () => {
      picker.value = link.dataset.layer;
      await drawTokens();
    });
  }
  dark.addEventListener("change", async () => drawEach(all));
  drawEach(all).then(() => {
    document.body.dataset.drawn = "";
  });
})();
