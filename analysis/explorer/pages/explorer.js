// The explorer's pages: expert colours, a text with its tokens' paths, and news since the page was rendered.
// All text is inserted as text, never as markup.
"use strict";
(() => {
  const body = document.body.dataset;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e6b000", "#56b4e9", "#8a6d5b", "#7b3294"];
  const strongest = (experts) => (!dark.matches ? 0.6 : experts <= PALETTE.length ? 0.45 : 0.35); // keeps the text in front readable

  const rgb = (expert, experts) => {
    if (experts <= PALETTE.length) return [1, 3, 5].map((at) => parseInt(PALETTE[expert].slice(at, at + 2), 16));
    const hue = (expert * 137.508) % 360, light = dark.matches ? 0.62 : 0.5; // the golden angle: neighbours differ
    const part = (n) => {
      const k = (n + hue / 30) % 12;
      return Math.round(255 * (light - 0.65 * Math.min(light, 1 - light) * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
    };
    return [part(0), part(8), part(4)];
  };
  const colour = (expert, experts, strength) => `rgb(${rgb(expert, experts).join(" ")} / ${(strongest(experts) * strength).toFixed(3)})`;

  const element = (tag, text, attributes = {}) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const drawn = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };

  // Colour what the server rendered: chips, and the maps of layers and experts.
  const paint = () => {
    const experts = Number(body.experts);
    for (const node of document.querySelectorAll(".chip")) node.style.backgroundColor = colour(Number(node.dataset.expert), experts, 0.9);
    for (const node of document.querySelectorAll("[data-share]")) node.style.backgroundColor = colour(Number(node.dataset.expert), experts, Number(node.dataset.share));
    for (const node of document.querySelectorAll("[data-load]")) {
      const off = Math.max(-1, Math.min(1, Number(node.dataset.load) - 1)); // from 0 to twice the even share
      node.style.backgroundColor = `rgb(${off < 0 ? "31 95 168" : "224 138 53"} / ${Math.abs(off * 0.6).toFixed(3)})`;
    }
  };

  // Keyboard shortcuts, ignored while typing; the help lists them.
  const keys = new Map();
  const key = (name, said, action) => keys.set(name, { said, action });
  const typing = ({ target }) => target.closest("input:not([type=range]):not([type=checkbox]), select, textarea, dialog");
  document.addEventListener("keydown", (event) => {
    const found = keys.get(event.key);
    if (!found?.action || event.ctrlKey || event.metaKey || event.altKey || typing(event)) return;
    event.preventDefault();
    found.action();
  });
  const help = () => {
    const dialog = element("dialog", undefined, { "aria-labelledby": "keys-title" }), list = element("dl");
    for (const [name, { said }] of keys) list.append(element("dt", name), element("dd", said));
    const close = element("form", undefined, { method: "dialog" });
    close.append(element("button", "Close"));
    dialog.append(element("h2", "Keyboard shortcuts", { id: "keys-title" }), list, close);
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  };

  // A text with its routes.
  const reader = (data) => {
    const { layers, experts, choices, words, distributions, indented, documents } = data;
    const measures = { // what else a text can be coloured by, and the value at which the colour is full
      surprise: { name: "surprise of the next token", unit: "nats", most: Math.log(words), digits: 2 },
      entropy: { name: "router entropy", unit: "bits", most: Math.log2(experts), digits: 2 },
    };
    const by = (id) => document.getElementById(id);
    const text = by("text"), slider = by("layer"), path = by("path");
    const asked = new URLSearchParams(location.search);
    const state = { document: 0, layer: Math.max(0, layers.indexOf(Number(asked.get("layer") ?? layers[0]))), alone: null, token: null, by: asked.get("by") ?? "expert", mono: asked.has("mono") ? asked.get("mono") !== "0" : indented, blanks: asked.has("blanks") };
    const whole = (name, below) => (/^\d+$/.test(asked.get(name) ?? "") && Number(asked.get(name)) < below ? Number(asked.get(name)) : null);
    state.alone = whole("expert", experts);
    state.token = whole("token", Infinity);
    let spans = [], routes;

    const raw = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const floats = (base64) => (base64 == null ? null : new Float32Array(raw(base64).buffer));
    const known = (value) => (Number.isNaN(value) ? null : value);
    const decoded = ({ expert, weight, scale, bytes, weighed, surprise, entropy }) => {
      const chosen = raw(expert), weights = new Uint16Array(raw(weight).buffer);
      const at = (token, layer, k) => (token * layers.length + layer) * choices + k;
      const wide = bytes === 1 ? chosen : new Uint16Array(chosen.buffer);
      const missing = bytes === 1 ? 255 : 65535;
      const measured = { surprise: floats(surprise), entropy: floats(entropy) };
      return {
        has: (name) => measured[name] != null,
        effects: {},
        surprise: (token) => known(measured.surprise[token]),
        entropy: (token, layer) => known(measured.entropy[token * layers.length + layer]),
        expert: (token, layer, k) => (wide[at(token, layer, k)] === missing ? null : wide[at(token, layer, k)]),
        weight: (token, layer, k) => weights[at(token, layer, k)] * scale, // 1 if there are no weights
        said: (token, layer, k, before, after = "") => (weighed ? before + (weights[at(token, layer, k)] * scale).toFixed(3) + after : ""),
        most: Math.max(1, scale * 65535), // full strength is 1, so that pages are comparable; higher if some weights are
      };
    };

    const share = () => {
      const url = new URL(location);
      const set = (name, value) => (value === null ? url.searchParams.delete(name) : url.searchParams.set(name, value));
      set("layer", layers[state.layer]);
      set("expert", state.alone);
      set("token", state.token);
      set("by", state.by === "expert" ? null : state.by);
      set("mono", state.mono === indented ? null : Number(state.mono));
      set("blanks", state.blanks ? 1 : null);
      if (documents.length > 1) set("document", state.document);
      try { history.replaceState(null, "", url); } catch { /* a page opened as a file may not change its address */ }
    };

    const rank = (token) => { // which choice is shown: the first, or that of the selected expert
      if (state.alone === null) return 0;
      for (let k = 0; k < choices; k++) if (routes.expert(token, state.layer, k) === state.alone) return k;
      return -1;
    };

    // One hue for positive numbers, another for negative ones: no colour at 0, full colour at the value of a uniform guess
    // or of a router with equal probabilities.
    const toned = (part) => `rgb(${part < 0 ? (dark.matches ? "98 160 222" : "31 95 168") : dark.matches ? "242 161 78" : "213 94 0"} / ${((dark.matches ? 0.4 : 0.6) * Math.min(1, Math.abs(part))).toFixed(3)})`;
    const number = (value, { digits, unit }) => (value === null ? "not available" : `${value.toFixed(digits)} ${unit}`);

    const colourByNumber = () => {
      const measure = measures[state.by];
      spans.forEach((span, token) => {
        const value = routes[state.by](token, state.layer);
        span.classList.toggle("missing", value === null);
        span.style.backgroundColor = value === null ? "" : toned(value / measure.most);
      });
      const scale = [0, 0.25, 0.5, 0.75, 1].map((part) => { const box = element("i"); box.style.backgroundColor = toned(part); return box; });
      const scaled = element("span", undefined, { class: "scale" });
      scaled.append("0", ...scale, `${measure.most.toFixed(1)} ${measure.unit}`);
      by("legend").replaceChildren(scaled);
      by("key").textContent = `Colour: ${measure.name}. Full colour is ${number(measure.most, measure)}, ${state.by === "surprise" ? "the value of a uniform guess among all tokens. Surprise says how improbable the following token is." : "the value of a router that gives all experts the same probability."}`;
    };

    // How much better or worse another capture predicts each token; requested from the server when selected.
    const against = () => (state.by.startsWith("effect:") ? state.by.slice("effect:".length) : null);
    const effect = (token) => known(routes.effects[against()]?.values?.[token] ?? NaN);
    const FULL = 2; // nats: exp(2) = 7.4 times as probable
    const loadEffect = async (name) => {
      const own = documents[state.document], { effects } = routes;
      if (effects[name]) return;
      effects[name] = {};
      try {
        const place = new URLSearchParams({ row: own.row, start: own.start, against: name });
        const answer = await (await fetch(`/${encodeURIComponent(body.dataset)}/effect?${place}`)).json();
        effects[name] = { error: answer.error, values: floats(answer.effect) };
      } catch { effects[name] = { error: "The explorer is not running." }; }
      if (routes.effects === effects) change();
    };
    const colourByEffect = () => {
      const name = against();
      loadEffect(name);
      spans.forEach((span, token) => {
        const value = effect(token);
        span.classList.toggle("missing", value === null);
        span.style.backgroundColor = value === null ? "" : toned(value / FULL);
      });
      const scaled = element("span", undefined, { class: "scale" });
      scaled.append("worse", ...[-1, -0.5, 0, 0.5, 1].map((part) => { const box = element("i"); box.style.backgroundColor = toned(part); return box; }), "better");
      by("legend").replaceChildren(scaled);
      by("key").textContent = routes.effects[name].error ?? `Colour: how much better or worse ${name} predicts the token than ${body.dataset}. Full colour is ${FULL} nats.`;
    };

    const colourByExpert = () => {
      by("key").textContent = "Colour: the token's first choice, or the selected expert. Strength: its weight; full colour is 1.";
      const counts = new Array(experts).fill(0);
      spans.forEach((span, token) => {
        const first = routes.expert(token, state.layer, 0), k = rank(token);
        if (first !== null) counts[first]++;
        span.classList.toggle("missing", first === null);
        span.style.backgroundColor = first === null || k < 0 ? "" : colour(routes.expert(token, state.layer, k), experts, routes.weight(token, state.layer, k) / routes.most);
      });
      const shown = [...counts.keys()].filter((e) => counts[e] || e === state.alone).sort((a, b) => (experts <= 16 ? a - b : (b === state.alone) - (a === state.alone) || counts[b] - counts[a])).slice(0, 16);
      by("legend").replaceChildren(...shown.map((e) => {
        const button = element("button", `${e} · ${Math.round((100 * counts[e]) / Math.max(1, spans.length))}%`, { type: "button", "aria-pressed": state.alone === e, "aria-label": `expert ${e}, first choice of ${counts[e]} tokens here` });
        button.style.backgroundColor = colour(e, experts, 0.9);
        button.onclick = () => { state.alone = state.alone === e ? null : e; change(); by("legend").querySelector(`[data-expert="${e}"]`)?.focus(); };
        button.dataset.expert = e;
        return button;
      }));
    };

    const colourText = () => {
      (against() !== null ? colourByEffect : state.by === "expert" ? colourByExpert : colourByNumber)();
      slider.value = state.layer;
      slider.setAttribute("aria-valuetext", `layer ${layers[state.layer]}`);
      by("layer-number").textContent = layers[state.layer];
    };

    // Layers from left to right, experts from top to bottom, in pixels of the picture, so that dots stay round.
    const drawPath = (token) => {
      const width = path.clientWidth || 300, height = path.clientHeight || 200, edge = 9, label = 7 * String(experts - 1).length + 6;
      const X = (layer) => label + edge + ((width - label - 2 * edge) * (layer + 0.5)) / layers.length;
      const Y = (expert) => edge + ((height - 2 * edge) * (expert + 0.5)) / experts;
      const largest = Math.min(8, 0.45 * (X(1) - X(0)), Math.max(3, 0.45 * (Y(1) - Y(0))));
      path.setAttribute("viewBox", `0 0 ${width} ${height}`);
      const parts = [drawn("line", { class: "here", x1: X(state.layer), x2: X(state.layer), y1: 0, y2: height })];
      for (const expert of experts <= 16 ? Array(experts).keys() : [0, experts - 1]) {
        const number = drawn("text", { x: label, y: Y(expert) + 4 });
        number.textContent = expert;
        parts.push(number);
      }
      if (layers.length * experts <= 512) {
        layers.forEach((_, l) => { for (let e = 0; e < experts; e++) parts.push(drawn("circle", { class: "grid", cx: X(l), cy: Y(e), r: 1.2 })); });
      }
      if (token !== null && routes.expert(token, 0, 0) !== null) {
        parts.push(drawn("polyline", { points: layers.map((_, l) => `${X(l)},${Y(routes.expert(token, l, 0))}`).join(" ") }));
        for (let k = choices - 1; k >= 0; k--) {
          layers.forEach((number, l) => {
            const expert = routes.expert(token, l, k), weight = routes.weight(token, l, k);
            const dot = drawn("circle", { cx: X(l), cy: Y(expert), r: 1.5 + (largest - 1.5) * Math.sqrt(weight / routes.most), ...(k ? { class: "other" } : {}) });
            if (!k && X(1) - X(0) >= 18) {
              const name = drawn("text", { class: "name", x: X(l), y: Y(expert) - largest - 2 > 8 ? Y(expert) - largest - 2 : Y(expert) + largest + 10 });
              name.textContent = expert;
              parts.push(name);
            }
            if (!k) dot.style.fill = `rgb(${rgb(expert, experts).join(" ")})`;
            const title = drawn("title", {});
            title.textContent = `layer ${number}: choice ${k + 1} is expert ${expert}${routes.said(token, l, k, ", weight ")}`;
            dot.append(title);
            parts.push(dot);
          });
        }
      }
      path.replaceChildren(...parts);
    };

    const show = (token) => {
      const own = documents[state.document];
      by("panel").toggleAttribute("data-empty", token === null);
      by("token").replaceChildren();
      by("links").replaceChildren();
      drawPath(token);
      if (token === null) {
        by("token").append(element("span", "Point at a token, or tap it, to see its experts at all layers. Press k or j to change the layer, and n to go to the token's next occurrence.", { class: "soft" }));
        return;
      }
      const chosen = Array.from({ length: choices }, (_, k) => [routes.expert(token, state.layer, k), routes.said(token, state.layer, k, " (", ")")]);
      const chosenWords = chosen[0][0] === null ? "experts not available" : chosen.map(([expert, weight]) => `expert ${expert}${weight}`).join(", ");
      by("token").append(element("span", own.texts[token].replaceAll("\n", "↵") || "(no text)", { class: "word" }), element("br"),
        `token ${own.offset + token}${own.roles?.[token] ? `, ${own.roles[token]}` : ""}; layer ${layers[state.layer]}: ${chosenWords}`,
        ...Object.keys(measures).filter(routes.has).map((name) => `; ${measures[name].name} ${number(routes[name](token, state.layer), measures[name])}`),
        ...(against() === null ? [] : [`; effect of ${against()} ${number(effect(token), { digits: 3, unit: "nats" })}`]));
      if (body.dataset) {
        const base = `/${encodeURIComponent(body.dataset)}`;
        by("links").append(element("a", "all places of this token", { href: `${base}/token/${own.ids[token]}` }));
        for (const [expert] of chosen) if (expert !== null) by("links").append(" · ", element("a", `expert ${expert}`, { href: `${base}/expert/${layers[state.layer]}/${expert}` }));
      }
    };

    // The full distribution of the selected token at the layer; requested once for all layers.
    let asks = 0, kept = { token: null };
    const showDistribution = async () => {
      const token = state.token, own = documents[state.document], asking = ++asks;
      by("distribution").replaceChildren();
      if (token === null || !distributions || !body.dataset) return;
      if (kept.token !== token) {
        try {
          const answer = await (await fetch(`/${encodeURIComponent(body.dataset)}/distribution?row=${own.row}&position=${own.start + token}`)).json();
          if (asking !== asks) return; // another token was selected meanwhile
          kept = { token, answer };
        } catch { return; } // the explorer is not running, which the header reports
      }
      const { error, probability, chosen, of, experts: ids } = kept.answer;
      if (error) { by("distribution").append(element("p", error, { class: "soft" })); return; }
      const at = state.layer, rows = ids[at].map((expert, index) => ({ expert, share: probability[at][index], taken: chosen[at].includes(expert) }));
      const listed = rows.length <= 16 ? rows : rows.sort((a, b) => b.share - a.share).slice(0, 16);
      const table = element("table");
      table.append(element("caption", `Layer ${layers[at]}, ${ids[at].length < of ? `the ${ids[at].length} largest of ${of} logits, normalized over these alone` : "the router's distribution"}; ${listed.length < rows.length ? `the ${listed.length} largest shown; ` : ""}chosen experts in colour`));
      table.append(...listed.map(({ expert, share, taken }) => {
        const row = element("tr", undefined, taken ? { class: "chosen" } : {}), cell = element("td", undefined, { class: "wide" });
        const bar = drawn("svg", { class: "bar", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" });
        const rect = drawn("rect", { width: 100 * share, height: 8 });
        if (taken) rect.style.fill = `rgb(${rgb(expert, experts).join(" ")})`;
        bar.append(rect);
        cell.append(bar);
        row.append(element("th", `${expert}${taken ? " ✓" : ""}`, { scope: "row", "aria-label": `expert ${expert}${taken ? ", chosen" : ""}` }), cell, element("td", share.toFixed(3)));
        return row;
      }));
      by("distribution").replaceChildren(table);
    };

    const change = () => {
      colourText();
      spans.forEach((span, token) => span.classList.toggle("at", token === state.token));
      show(state.token);
      showDistribution();
      share();
    };

    const open = (number) => {
      state.document = number;
      const own = documents[number];
      routes = decoded(own);
      kept = { token: null };
      const effects = (own.against ?? []).map(({ name, differs }) => [`effect:${name}`, `effect of ${name}${differs ? `: ${differs}` : ""}`]);
      const offered = [...Object.keys(measures).filter(routes.has), ...effects.map(([value]) => value)];
      if (state.by !== "expert" && !offered.includes(state.by)) state.by = "expert";
      by("by").replaceChildren(...["expert", ...offered].map((name) => element("option", measures[name]?.name ?? new Map(effects).get(name) ?? name, { value: name })));
      by("by").value = state.by;
      by("by-label").hidden = !offered.length;
      const blank = (text) => (state.blanks ? text.replaceAll(" ", "·") : text);
      spans = own.texts.map((piece) => element("span", blank(piece).replaceAll("\n", "↵\n")));
      text.replaceChildren(...spans.flatMap((span, at) => {
        const speaker = own.roles?.[at], before = own.roles?.[at - 1];
        return speaker && speaker !== before ? [element("b", speaker, { class: "speaker" }), span] : [span];
      }));
      if (state.token !== null && !(state.token >= 0 && state.token < spans.length)) state.token = null;
      change();
      if (state.token !== null) spans[state.token].scrollIntoView({ block: "center" });
    };

    const tokenOf = (event) => { const at = spans.indexOf(event.target); return at < 0 ? null : at; };
    text.addEventListener("pointerover", (event) => { const at = tokenOf(event); if (at !== null) show(at); });
    text.addEventListener("pointerleave", () => show(state.token));
    text.addEventListener("click", (event) => { const at = tokenOf(event); if (at !== null) { state.token = at === state.token ? null : at; change(); } });
    text.addEventListener("keydown", (event) => {
      if (!spans.length) return;
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], higher = { ArrowUp: 1, ArrowDown: -1 }[event.key];
      if (step) state.token = Math.max(0, Math.min(spans.length - 1, (state.token ?? (step > 0 ? -1 : spans.length)) + step));
      else if (higher) return event.preventDefault(), layer(higher);
      else if (event.key === "Escape") { state.token = null; state.alone = null; }
      else return;
      event.preventDefault();
      change();
      if (step) spans[state.token]?.scrollIntoView({ block: "nearest" });
    });
    by("mono").checked = state.mono;
    by("blanks").checked = state.blanks;
    const set = () => { text.classList.toggle("mono", state.mono); };
    set();
    by("mono").addEventListener("change", (event) => { state.mono = event.target.checked; set(); change(); });
    by("blanks").addEventListener("change", (event) => { state.blanks = event.target.checked; open(state.document); });
    // The selected token's next occurrence: on this page, otherwise found by the server.
    const occurrence = (step) => {
      const own = documents[state.document], { ids } = own;
      if (state.token === null) return;
      for (let at = state.token + step; at >= 0 && at < ids.length; at += step) {
        if (ids[at] !== ids[state.token]) continue;
        state.token = at;
        change();
        return spans[at].scrollIntoView({ block: "center" });
      }
      if (!body.dataset) return;
      const place = { token: ids[state.token], row: own.row, position: own.start + state.token, back: step < 0 ? 1 : 0, layer: layers[state.layer] };
      location.assign(`/${encodeURIComponent(body.dataset)}/next?${new URLSearchParams(place)}`);
    };
    const layer = (step) => { state.layer = Math.max(0, Math.min(layers.length - 1, state.layer + step)); change(); };
    key("n", "next occurrence of the selected token", () => occurrence(1));
    key("p", "previous occurrence", () => occurrence(-1));
    key("k", "one layer up", () => layer(1));
    key("j", "one layer down", () => layer(-1));
    key("← →", "previous or next token (click into the text first)");
    key("Esc", "clear the selection");
    by("by").addEventListener("change", (event) => { state.by = event.target.value; change(); });
    slider.max = layers.length - 1;
    slider.addEventListener("input", () => { state.layer = Number(slider.value); change(); });
    by("first-layer").textContent = layers[0];
    by("last-layer").textContent = layers.at(-1);
    if (documents.length > 1) {
      by("chooser").hidden = false;
      by("document").append(...documents.map(({ name }, number) => element("option", `${number + 1}. ${name}`, { value: number })));
      by("document").addEventListener("change", (event) => { state.token = null; open(Number(event.target.value)); });
    }
    dark.addEventListener("change", () => change());
    window.addEventListener("resize", () => show(state.token));
    by("reader").hidden = false;
    const first = Number(asked.get("document") ?? 0);
    open(documents[first] ? first : 0);
    if (documents.length > 1) by("document").value = state.document;
    document.body.dataset.drawn = "";
  };

  // The progress of a running capture; the page does not change until the reader asks for it.
  const follow = async () => {
    const line = document.getElementById("state");
    let said = "", more = false, wait = 5000;
    try {
      const { sets } = await (await fetch("/-/state.json")).json();
      const own = sets.filter(({ name }) => body.dataset === undefined || name === body.dataset);
      said = own.map(({ note }) => note).filter(Boolean).join(" ");
      more = own.map(({ digest }) => digest).join(" ") !== body.digests;
      wait = own.some(({ busy }) => busy) ? 2000 : 15000;
    } catch {
      said = "The explorer is not running. Start it again with the same command and this page continues.";
    }
    if (line.dataset.said !== `${said}${more}`) { // otherwise the button would lose the focus
      line.dataset.said = `${said}${more}`;
      line.textContent = said;
      if (more) {
        const button = element("button", "Show new results", { type: "button" });
        button.onclick = () => location.reload();
        line.append(" ", button);
      }
    }
    setTimeout(follow, wait);
  };

  if (document.querySelector("[data-reload]")) setTimeout(() => location.reload(), 2000);
  const search = document.getElementById("find");
  if (search) key("/", "search", () => { search.focus(); search.select(); });
  for (const link of document.querySelectorAll("[aria-keyshortcuts]")) key(link.getAttribute("aria-keyshortcuts"), link.title || link.textContent, () => link.click());
  paint();
  dark.addEventListener("change", paint);
  const data = document.getElementById("data");
  if (data) reader(JSON.parse(data.textContent));
  key("?", "this help", help);
  const shortcuts = document.getElementById("keys");
  if (shortcuts) { shortcuts.hidden = false; shortcuts.onclick = help; }
  if (document.getElementById("state")) follow();
})();
