"use strict";

// The data is prepared first (functions without a document), then drawn. All rows have one height, so that where a row
// is follows from its number, and of thousands of rows only those in view exist as elements.

const SIDES = ["before", "after"];
const CLASSES = ["forward", "input_grad", "weight_grad", "other"];
const CLASS_NAMES = { forward: "forward", input_grad: "input gradient", weight_grad: "weight gradient", other: "other" };
const FORWARD = 0, BACKWARD = 1;
const STATUS = {
  removed: ["\u2212", "removed"],
  rewritten: ["\u223c", "replaced by another operator"],
  narrowed: ["\u25d0", "narrowed: computes less, or from less"],
  hoisted: ["\u21e1", "hoisted: computed once per attack"],
  new: ["+", "put in by a pass"],
  kept: ["!", "kept, although it computes more than is used"],
};
const DID = { removed: "removed", narrowed: "narrowed", hoisted: "hoisted", skipped: "kept" };

// --- Figures ---------------------------------------------------------------------------------------------------------

function unitOf(largest) {
  for (const [unit, prefix] of [[1e12, "T"], [1e9, "G"], [1e6, "M"]]) if (largest >= unit) return [unit, prefix];
  return [1e3, "k"];
}

function fixed(value, digits) {
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function amount(value, what) {
  if (!value) return "0 " + what;
  if (value < 1000) return value + " " + what;
  const [unit, prefix] = unitOf(value);
  const scaled = value / unit;
  return fixed(scaled, scaled < 10 ? 2 : scaled < 100 ? 1 : 0) + " " + prefix + what;
}

const bytes = (value) => amount(value, "B");
const flops = (value) => amount(value, "FLOP");
const sum = (values) => values.reduce((total, value) => total + value, 0);
const most = (values) => values.reduce((largest, value) => Math.max(largest, value), 1);
const total = (classes) => (classes ? sum(Object.values(classes)) : 0);

function escaped(text) {
  return String(text).replace(/[&<>"']/g, (c) => "&#" + c.charCodeAt(0) + ";");
}

// --- Data ------------------------------------------------------------------------------------------------------------

// One entry for each node name, with the node before and the node after the passes.
function prepare(data) {
  const entries = new Map();
  const anyHoisted = data.passes.some((record) => record.changes.some((change) => change[0] === "hoisted"));
  for (const when of SIDES) {
    const graph = data[when];
    graph.nodes.forEach((node, index) => {
      Object.assign(node, { index, users: [], inputs: node.inputs || [], savedFor: [], reads: [] });
      const entry = entries.get(node.name) || { name: node.name, changes: [], before: null, after: null };
      entry[when] = node;
      node.entry = entry;
      entries.set(node.name, entry);
    });
    for (const node of graph.nodes) for (const input of node.inputs) graph.nodes[input].users.push(node.index);
    for (const [owner, readers] of graph.saved) {
      graph.nodes[owner].savedFor = readers;
      for (const reader of readers) graph.nodes[reader].reads.push(owner);
    }
    graph.calls = graph.nodes.filter((node) => node.phase !== "input" && node.phase !== "output");
  }
  for (const record of data.passes)
    for (const [kind, name, operator, reason] of record.changes) {
      const entry = entries.get(name);
      if (entry) entry.changes.push({ kind, reason, operator, pass: record.name });
    }
  for (const entry of entries.values()) {
    const { before, after } = entry, node = before || after, graph = before ? data.before : data.after;
    const did = (kind) => entry.changes.some((change) => change.kind === kind);
    const module = graph.modules[node.module];
    entry.path = module.path;
    entry.type = module.type;
    entry.lane = node.phase === "input" || node.phase === "forward" ? FORWARD : BACKWARD;
    entry.source = node.source === undefined ? "" : graph.sources[node.source];
    if (!after) entry.status = did("removed") || !did("narrowed") ? "removed" : "rewritten";
    else if (after.prologue && anyHoisted) entry.status = "hoisted";
    else if (!before) entry.status = "new";
    else entry.status = did("narrowed") ? "narrowed" : did("skipped") ? "kept" : "";
    entry.weightGradient = SIDES.some((when) => entry[when] && entry[when].weight_grad);
    entry.saved = SIDES.some((when) => entry[when] && entry[when].savedFor.length);
    const tags = [entry.status && "is:" + entry.status, entry.weightGradient && "is:weight-gradient"];
    for (const when of SIDES) if (entry[when] && entry[when].savedFor.length) tags.push("is:saved", "saved:" + when);
    for (const change of entry.changes) tags.push("is:" + DID[change.kind], "pass:" + change.pass, change.reason);
    const words = [entry.name, entry.path, entry.type, entry.source, ...tags.filter(Boolean)];
    for (const when of SIDES) if (entry[when]) words.push(entry[when].op, entry[when].value, entry[when].role);
    entry.haystack = words.filter(Boolean).join("\n").toLowerCase();
  }
  return entries;
}

// The entries of one lane side by side: pairs of what is shown before and after. What is in both graphs is one row, in
// an order that keeps that of both as far as they agree; between those, what is gone stands beside what has come.
function paired(entries) {
  const before = entries.filter((entry) => entry.before).sort((p, q) => p.before.index - q.before.index);
  const after = entries.filter((entry) => entry.after).sort((p, q) => p.after.index - q.after.index);
  const placed = new Set(), pairs = [];
  let gone = [], come = [], next = 0;
  const flush = () => {
    for (let k = 0; k < Math.max(gone.length, come.length); k++) pairs.push([gone[k] || null, come[k] || null]);
    gone = [];
    come = [];
  };
  const take = (entry) => {
    if (placed.has(entry)) return;
    placed.add(entry);
    if (entry.before && entry.after) { flush(); pairs.push([entry, entry]); }
    else (entry.before ? gone : come).push(entry);
  };
  for (const entry of after) {
    if (entry.before) while (!placed.has(entry)) take(before[next++]);
    else take(entry);
  }
  before.slice(next).forEach(take);
  flush();
  return pairs;
}

// The tree of modules. Groups have either children or lanes of entries.
function buildTree(entries) {
  const byPath = new Map(), types = new Map();
  for (const entry of entries.values()) {
    if (!byPath.has(entry.path)) byPath.set(entry.path, []);
    byPath.get(entry.path).push(entry);
    if (entry.type) types.set(entry.path, entry.type);
  }
  const root = { path: null, children: [], depth: -1, index: new Map() };
  for (const [path, members] of byPath) {
    let group = root, prefix = "";
    for (const part of path === "" || path.startsWith("(") ? [path || "(model)"] : path.split(".")) {
      prefix = prefix ? prefix + "." + part : part;
      if (!group.index.has(part)) {
        const child = { path: prefix, label: part, type: types.get(prefix) || "", children: [], index: new Map(), parent: group, depth: group.depth + 1 };
        group.index.set(part, child);
        group.children.push(child);
      }
      group = group.index.get(part);
    }
    group.own = members;
  }
  const finish = (group) => {
    group.children.forEach(finish);
    if (group.own && group.children.length) {
      const own = { path: group.path, label: "(itself)", type: group.type, children: [], own: group.own, parent: group, depth: group.depth + 1 };
      finish(own);
      group.children.push(own);
      group.own = null;
    }
    const members = (group.own || []).concat(...group.children.map((child) => child.members));
    group.members = members;
    const rank = { "(inputs)": -3, "(update)": -2, "(before the model)": -1, "(after the model)": Infinity };
    const places = members.filter((entry) => entry.lane === FORWARD).map((entry) => (entry.before ? entry.before.index : Infinity));
    const fallback = members.map((entry) => (entry.before || entry.after).index);
    group.place = group.path in rank ? rank[group.path] : Math.min(...(places.some(isFinite) ? places : fallback));
    group.children.sort((p, q) => p.place - q.place);
    group.lanes = [FORWARD, BACKWARD].map((lane) => {
      const pairs = group.own ? paired(group.own.filter((entry) => entry.lane === lane)) : [];
      return lane === BACKWARD ? pairs.reverse() : pairs; // backward runs upwards
    });
    for (const entry of group.own || []) entry.group = group;
    group.figures = SIDES.map((when) =>
      [FORWARD, BACKWARD].map((lane) => {
        const nodes = members.filter((entry) => entry.lane === lane && entry[when]).map((entry) => entry[when]);
        const calls = nodes.filter((node) => node.phase !== "input" && node.phase !== "output");
        const classes = Object.fromEntries(CLASSES.map((name) => [name, sum(calls.map((node) => (node.flops && node.flops[name]) || 0))]));
        return { ops: calls.length, inputs: nodes.length - calls.length, classes, flops: total(classes) };
      }));
  };
  finish(root);
  return root;
}

const depthOf = (group) => Math.max(group.lanes[0].length, group.lanes[1].length);

// Open what fits on a few screens: levels from the outside in, and small modules.
function openSome(root) {
  let budget = 110, level = root.children;
  const walk = (group) => { group.open = group.children.length === 0 && depthOf(group) <= 2; group.children.forEach(walk); };
  walk(root);
  root.open = true;
  budget -= level.length;
  while (level.length) {
    const next = [];
    for (const group of level)
      if (group.children.length && budget >= group.children.length) {
        group.open = true;
        budget -= group.children.length;
        next.push(...group.children);
      }
    level = next;
  }
}

// The visible rows, top to bottom, and for every entry and group the row it is shown in. A row of nodes has four cells:
// forward and backward before the passes, forward and backward after them.
function flatten(root, matches, view) {
  const rows = [], rowOf = new Map();
  const sides = SIDES.map((when) => view === "both" || view === when);
  const shows = (entry, side) => Boolean(entry && sides[side] && (!matches || matches.has(entry)));
  const visit = (group, into) => {
    if (!group.members.some((entry) => SIDES.some((when, side) => entry[when] && shows(entry, side)))) return;
    const lanes = group.lanes.map((pairs) =>
      pairs.map((pair) => pair.map((entry, side) => (shows(entry, side) ? entry : null))).filter((pair) => pair[0] || pair[1]));
    const open = matches ? true : group.open;
    const row = into === undefined ? rows.length : into;
    rowOf.set(group, row);
    if (into !== undefined || !open || group.children.length) {
      if (into === undefined) rows.push({ group, open, summary: true });
      if (!open || into !== undefined) {
        for (const entry of group.members) if (!matches || matches.has(entry)) rowOf.set(entry, row);
        if (group.children.length) group.children.forEach((child) => visit(child, row));
        return;
      }
      group.children.forEach((child) => visit(child));
      return;
    }
    const count = Math.max(lanes[0].length, lanes[1].length);
    for (let k = 0; k < count; k++) {
      const [forward, backward] = lanes.map((pairs) => pairs[k] || [null, null]);
      const cells = [forward[0], backward[0], forward[1], backward[1]];
      cells.forEach((entry) => entry && rowOf.set(entry, rows.length));
      rows.push({ group, open, first: k === 0, cells });
    }
  };
  root.children.forEach((child) => visit(child));
  return { rows, rowOf };
}

// Saved tensors as connections of rows, those of folded modules bundled.
function connections(graph, layout) {
  const found = new Map();
  for (const [owner, readers] of graph.saved) {
    const size = graph.nodes[owner].bytes || 0;
    const from = layout.rowOf.get(graph.nodes[owner].entry);
    const direct = readers.filter((reader) => !graph.nodes[reader].view); // rather than the views they read it through
    for (const reader of direct.length ? direct : readers) {
      const to = layout.rowOf.get(graph.nodes[reader].entry);
      if (from === undefined || to === undefined) continue;
      const key = from + ":" + to;
      const line = found.get(key) || { from, to, owners: new Map(), ends: new Set() };
      line.owners.set(owner, size);
      line.ends.add(graph.nodes[owner].entry).add(graph.nodes[reader].entry);
      found.set(key, line);
    }
  }
  return [...found.values()].map((line) => ({ ...line, bytes: sum([...line.owners.values()]) }));
}

// The curve of one side: x runs from 0 to 1, the forward and the backward pass each over a fixed share.
function curve(graph, share) {
  const first = graph.calls.findIndex((node) => node.phase === "backward");
  const forward = first < 0 ? graph.calls.length : first;
  const rest = graph.calls.length - forward;
  const x = (k) => (k < forward ? (k / Math.max(forward, 1)) * share : share + ((k - forward) / Math.max(rest - 1, 1)) * (1 - share));
  const at = (position) => {
    const k = position < share || !rest ? Math.round((position / share) * forward) : forward + Math.round(((position - share) / (1 - share)) * (rest - 1));
    return Math.max(0, Math.min(graph.calls.length - 1, k));
  };
  return { x, at, forward };
}

// --- The page --------------------------------------------------------------------------------------------------------

function start(data) {
  const $ = (id) => document.getElementById(id);
  const entries = prepare(data);
  const root = buildTree(entries);
  openSome(root);
  const fattest = Math.max(1, ...SIDES.flatMap((when) => data[when].saved.map(([owner]) => data[when].nodes[owner].bytes || 0)));
  const state = { query: "", matches: null, view: "both", cursor: { row: 0, column: 0 }, selected: null };
  let layout, lines, drawn = "";

  $("subtitle").textContent = data.title;
  if (data.fallback) {
    $("fallback").hidden = false;
    $("fallback").textContent = "Compiled as captured: " + data.fallback;
  }
  drawFigures();
  const moveReading = drawMemory();
  drawPasses();
  drawToolbar();
  drawHelp();
  setTheme();
  relayout();
  showDetails();
  select(decodeURIComponent(location.hash.slice(1)), true);

  // --- Overview

  function drawFigures() {
    const report = data.report, rows = [];
    const add = (label, values, unit, digits, part, segments) => {
      const largest = Math.max(values.before, values.after);
      const ratio = values.before && values.after !== values.before ? change(values) : "";
      const bars = segments || SIDES.map((when) => [["c-" + when, values[when] / Math.max(largest, 1)]]);
      rows.push(
        `<tr class="${part ? "part" : ""}" data-figure="${escaped(label)}"><th scope="row">${part ? `<span class="swatch c-${part}"></span>` : ""}${escaped(label)}</th>` +
        SIDES.map((when) => `<td>${fixed(values[when] / unit, digits)}</td>`).join("") +
        `<td class="ratio">${ratio}</td><td class="bars" aria-hidden="true">${part ? "" : bars.map(track).join("")}</td></tr>`);
    };
    add("operators", report.ops, 1, 0);
    const totals = { before: total(report.flops.before), after: total(report.flops.after) };
    const largest = Math.max(totals.before, totals.after, 1);
    const [unit, prefix] = unitOf(largest);
    add(prefix + "FLOP", totals, unit, 2, "", SIDES.map((when) => CLASSES.map((name) => ["c-" + name, report.flops[when][name] / largest])));
    for (const name of CLASSES) {
      const values = { before: report.flops.before[name], after: report.flops.after[name] };
      if (values.before || values.after) add(CLASS_NAMES[name], values, unit, 2, name);
    }
    for (const [label, values] of [["B saved for backward", report.saved_bytes], ["B peak, unfused", report.peak_bytes]]) {
      const [size, letter] = unitOf(Math.max(values.before, values.after));
      add(letter + label, values, size, 1);
    }
    $("figures").innerHTML = `<table><thead><tr><td></td><th scope="col">before</th><th scope="col">after</th><th scope="col">change</th><td></td></tr></thead><tbody>${rows.join("")}</tbody></table>`;
  }

  function change({ before, after }) {
    const percent = Math.round((after / before - 1) * 100);
    return (percent < 0 ? "\u2212" : "+") + Math.abs(percent) + " %";
  }

  function track(parts) {
    return `<div class="track">${parts.map(([kind, part]) => `<i class="${kind}${part ? "" : " empty"}" style="width:${(part * 100).toFixed(2)}%"></i>`).join("")}</div>`;
  }

  function drawMemory() {
    const chart = $("chart");
    const forward = data.before.calls.findIndex((node) => node.phase === "backward");
    const share = forward < 0 ? 1 : Math.min(0.8, Math.max(0.2, forward / data.before.calls.length));
    const top = Math.max(most(data.before.memory), most(data.after.memory)) * 1.08;
    const curves = {}, peaks = {};
    const shape = (when) => {
      const memory = data[when].memory, { x } = (curves[when] = curve(data[when], share));
      peaks[when] = memory.indexOf(most(memory));
      // One point for each pixel at most, the highest there.
      const points = new Map();
      memory.forEach((value, k) => { const px = Math.round(x(k) * 700); points.set(px, Math.max(points.get(px) || 0, value)); });
      const path = [...points].map(([px, value], k) => `${k ? "L" : "M"}${px} ${(200 - (value / top) * 200).toFixed(1)}`).join("");
      return memory.length ? `<path class="${when[0]} area" d="${path}L700 200L0 200Z"/><path class="${when[0]} line" d="${path}"/>` : "";
    };
    chart.innerHTML = `<svg viewBox="0 0 700 200" preserveAspectRatio="none" aria-hidden="true">${SIDES.map(shape).join("")}</svg>` +
      (share < 1 ? `<span class="phase" style="left:${share * 100}%">backward</span><span class="phase" style="left:0;border:0">forward</span>` : "") +
      SIDES.map((when) => peaks[when] < 0 ? "" : `<span class="peak c-${when}" style="opacity:1;left:${curves[when].x(peaks[when]) * 100}%;top:${100 - (data[when].memory[peaks[when]] / top) * 100}%"></span>`).join("") +
      '<span class="cursor" hidden></span>';
    chart.previousElementSibling.innerHTML = `<span>Memory over the step, without fusion</span><span><span class="swatch c-before"></span>before &ensp;<span class="swatch c-after"></span>after</span>`;
    const line = chart.querySelector(".cursor");
    let position = 0;
    const say = (x, announce) => {
      position = Math.max(0, Math.min(1, x));
      line.hidden = false;
      line.style.left = position * 100 + "%";
      const parts = SIDES.map((when) => [when, curves[when].at(position)]).filter(([when]) => data[when].memory.length);
      $("reading").innerHTML = parts.map(([when, k]) => `${when} ${bytes(data[when].memory[k])} at <b>${escaped(data[when].calls[k].name)}</b>`).join(" &ensp;\u00b7&ensp; ");
      chart.setAttribute("aria-valuenow", Math.round(position * 1000));
      if (announce) chart.setAttribute("aria-valuetext", $("reading").textContent);
    };
    const rest = () => {
      line.hidden = true;
      $("reading").innerHTML = SIDES.filter((when) => peaks[when] >= 0).map((when) => `peak ${when} ${bytes(data[when].memory[peaks[when]])} at <b>${escaped(data[when].calls[peaks[when]].name)}</b>`).join(" &ensp;\u00b7&ensp; ");
      chart.setAttribute("aria-valuetext", $("reading").textContent);
    };
    const pick = () => {
      const after = data.after.calls[curves.after.at(position)], before = data.before.calls[curves.before.at(position)];
      const node = state.view === "before" ? before : after || before;
      if (node) select(node.name);
    };
    const place = (event) => { const box = chart.getBoundingClientRect(); return (event.clientX - box.left) / box.width; };
    chart.addEventListener("pointermove", (event) => say(place(event)));
    chart.addEventListener("pointerleave", rest);
    chart.addEventListener("click", (event) => { say(place(event)); pick(); });
    chart.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: -0.005, ArrowRight: 0.005, PageDown: -0.05, PageUp: 0.05, Home: -1, End: 1 };
      if (event.key in steps) say(position + steps[event.key], true);
      else if (event.key === "Enter" || event.key === " ") pick();
      else return;
      event.preventDefault();
    });
    rest();
    return (entry) => {
      const when = entry.after && entry.after.phase !== "input" ? "after" : "before";
      const k = entry[when] ? data[when].calls.indexOf(entry[when]) : -1;
      if (k >= 0) say(curves[when].x(k));
    };
  }

  function drawPasses() {
    const items = data.passes.map((record) => {
      const counts = new Map();
      for (const [kind] of record.changes) counts.set(DID[kind], (counts.get(DID[kind]) || 0) + 1);
      const text = [...counts].map(([kind, count]) => `${fixed(count, 0)} ${kind}`).join(", ");
      const title = `${record.tier === "exact" ? "exact" : "may round differently"}; ${record.ops[0]} operators before, ${record.ops[1]} after; ${fixed(record.seconds * 1e3, 0)} ms`;
      return `<button type="button" data-query="pass:${escaped(record.name)}" aria-pressed="false" title="${escaped(title)}" class="${record.changes.length ? "" : "idle"}">${escaped(record.name)}<small>${escaped(text)}</small></button>`;
    });
    $("passes").innerHTML = items.length ? '<span class="label">Passes, in order</span>' + items.join("") : '<span class="label">No pass ran</span>';
    $("passes").addEventListener("click", filterBy);
  }

  // --- Toolbar

  function drawToolbar() {
    const filters = [["is:removed", "removed"], ["is:weight-gradient", "weight gradient"], ["is:narrowed", "narrowed"], ["is:rewritten", "replaced"], ["is:hoisted", "hoisted"], ["is:new", "new"], ["is:kept", "kept"], ["is:saved", "saved"]];
    $("filters").innerHTML = filters.map(([query, label]) => {
      const count = find(query).size;
      return count ? `<button type="button" data-query="${query}" aria-pressed="false">${label} <small>${fixed(count, 0)}</small></button>` : "";
    }).join("");
    $("filters").addEventListener("click", filterBy);
    $("views").innerHTML = ["before", "both", "after"].map((view) => `<button type="button" data-view-name="${view}">${view[0].toUpperCase() + view.slice(1)}</button>`).join("");
    $("views").addEventListener("click", (event) => { const button = event.target.closest("button"); if (button) setView(button.dataset.viewName); });
    $("lanes").innerHTML = `<div class="columns"><span></span>` + SIDES.map((when) =>
      `<span class="side-${when[0]}"><b>${when[0].toUpperCase() + when.slice(1)}</b> \u00b7 forward \u2193</span><span class="gap side-${when[0]}">saved</span><span class="side-${when[0]}">backward \u2191</span>`).join('<span class="split"></span>') + "</div>";
    $("search").addEventListener("input", () => search($("search").value));
    $("search").addEventListener("keydown", (event) => {
      if (event.key === "Enter") { step(event.shiftKey ? -1 : 1); event.preventDefault(); }
      else if (event.key === "ArrowDown") { $("graph").focus(); event.preventDefault(); }
      else if (event.key === "Escape") { search(""); $("graph").focus({ preventScroll: true }); event.stopPropagation(); }
    });
    $("expand").addEventListener("click", () => setOpen(true));
    $("collapse").addEventListener("click", () => setOpen(false));
    $("theme").addEventListener("click", toggleTheme);
    $("help-button").addEventListener("click", () => $("help").showModal());
    document.querySelector("[data-skip]").addEventListener("click", (event) => { event.preventDefault(); $("graph").focus(); });
    setView("both");
  }

  function filterBy(event) {
    const button = event.target.closest("button");
    if (button) search(state.query === button.dataset.query ? "" : button.dataset.query);
  }

  function find(query) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    // A name is matched as a whole line where it is one of the words with a colon, "is:new" not by "is:news".
    const has = (entry, word) => /^(is|pass|saved):/.test(word) ? ("\n" + entry.haystack + "\n").includes("\n" + word + "\n") : entry.haystack.includes(word);
    return new Set([...entries.values()].filter((entry) => words.every((word) => has(entry, word))));
  }

  function search(query) {
    state.query = query.trim();
    if ($("search").value !== query) $("search").value = query;
    state.matches = state.query ? find(state.query) : null;
    $("matches").textContent = state.matches ? `${fixed(state.matches.size, 0)} ${state.matches.size === 1 ? "node" : "nodes"}` : "";
    for (const button of document.querySelectorAll("[data-query]")) button.setAttribute("aria-pressed", button.dataset.query === state.query);
    state.cursor = { row: 0, column: 0 };
    relayout();
    if (state.selected && !state.matches) reveal(state.selected);
    else if (state.matches && window.scrollY > top()) window.scrollTo(0, top());
  }

  // To the next or previous node that is shown, or that matches.
  function step(direction) {
    const order = [];
    layout.rows.forEach((row) => { if (row.cells) for (const entry of new Set(row.cells)) if (entry) order.push(entry); });
    if (!order.length) return;
    const now = order.indexOf(state.selected);
    select(order[(now + direction + order.length + (now < 0 && direction < 0 ? 1 : 0)) % order.length].name);
  }

  function setOpen(open) {
    // The inputs are a long list of names that few will read; their own arrow opens them.
    const walk = (group) => { group.open = (open && group.path !== "(inputs)") || group === root; group.children.forEach(walk); };
    const anchor = state.selected;
    walk(root);
    relayout();
    if (anchor && open) reveal(anchor);
    else { state.cursor = { row: 0, column: 0 }; draw(true); }
  }

  function setView(view) {
    state.view = view;
    $("explorer").dataset.view = view;
    for (const button of $("views").children) button.setAttribute("aria-pressed", button.dataset.viewName === view);
    if (layout) relayout();
  }

  function setTheme() {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    let chosen = null;
    try { chosen = localStorage.getItem("gradprune-theme"); } catch { /* a page opened from a file may have no storage */ }
    const apply = () => {
      const theme = chosen || (dark.matches ? "dark" : "light");
      document.documentElement.dataset.theme = theme;
      $("theme").setAttribute("aria-pressed", theme === "dark");
    };
    setTheme.choose = (theme) => {
      chosen = theme;
      try { localStorage.setItem("gradprune-theme", theme); } catch { /* then it holds for this visit */ }
      apply();
    };
    dark.addEventListener("change", apply);
    apply();
  }

  function toggleTheme() {
    setTheme.choose(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  }

  function drawHelp() {
    const keys = [["\u2191 \u2193 \u2190 \u2192", "move; \u2190 and \u2192 also close and open a module"], ["Enter", "open or close a module, show a node"], ["Home End", "first and last row"],
      ["/", "search; Enter goes to the next match, Esc ends it"], ["n p", "next and previous node"], ["e c", "expand all, collapse all"], ["b", "before, both, after"],
      ["Alt \u2190", "back to the node shown before (browser history)"], ["t", "light or dark"], ["Esc", "close the details"], ["?", "this list"]];
    $("help").innerHTML = `<h2 id="help-title">Keys</h2><dl>${keys.map(([key, text]) => `<dt>${key.split(" ").map((k) => `<kbd>${k}</kbd>`).join(" ")}</dt><dd>${text}</dd>`).join("")}</dl>` +
      "<p>Words in the search are looked for in names, operators, modules, shapes, source lines and reasons; all have to occur. <kbd>is:removed</kbd>, <kbd>is:saved</kbd>, <kbd>pass:narrow-outputs</kbd> and the like work too.</p>" +
      '<form method="dialog"><button autofocus>Close</button></form>';
  }

  // --- Graph

  function relayout() {
    layout = flatten(root, state.matches, state.view);
    lines = Object.fromEntries(SIDES.map((when) => [when, connections(data[when], layout)]));
    state.cursor.row = Math.max(0, Math.min(state.cursor.row, layout.rows.length - 1));
    $("graph").style.height = Math.max(layout.rows.length * rowHeight(), 60) + "px";
    $("graph").setAttribute("aria-rowcount", layout.rows.length);
    draw(true);
  }

  function rowHeight() { return 26; }
  function top() { return $("graph").getBoundingClientRect().top + window.scrollY - $("lanes").offsetHeight - $("toolbar").offsetHeight; }

  function draw(force) {
    const box = $("graph").getBoundingClientRect(), height = rowHeight();
    const first = Math.max(0, Math.floor(-box.top / height) - 15);
    const last = Math.min(layout.rows.length, Math.ceil((window.innerHeight - box.top) / height) + 15);
    const key = first + ":" + last;
    if (!force && key === drawn) return;
    drawn = key;
    const html = [];
    for (let k = first; k < last; k++) html.push(drawRow(layout.rows[k], k));
    if (!layout.rows.length) html.push('<p class="empty" role="row">No node matches.</p>');
    $("graph").innerHTML = html.join("") + `<div id="edges" aria-hidden="true">${SIDES.map((when) => drawEdges(when, first, last)).join("")}</div>`;
    const cursor = document.getElementById(`c${state.cursor.row}-${state.cursor.column}`);
    if (cursor) { cursor.classList.add("cursor-here"); $("graph").setAttribute("aria-activedescendant", cursor.id); }
    else $("graph").removeAttribute("aria-activedescendant");
  }

  function drawRow(row, k) {
    const { group } = row, header = row.summary || row.first;
    const label = header
      ? `<span class="twist ${row.open ? "open" : ""}">\u25b6</span><span class="label">${escaped(group.label)}</span><span class="kind">${escaped(group.type)}</span>` : "";
    const gutter = `<div class="gutter ${header ? "group" : ""}" id="c${k}-0" role="rowheader" style="padding-left:${group.depth * 14}px"${header ? ` title="${escaped(group.path)}"` : ""}>${label}</div>`;
    const column = (when, lane) => 1 + SIDES.indexOf(when) * 2 + lane;
    const cells = SIDES.map((when) => [FORWARD, BACKWARD].map((lane) => {
      const id = `c${k}-${column(when, lane)}`, side = "side-" + when[0];
      return row.summary ? drawSummary(group, group.figures[SIDES.indexOf(when)][lane], id, side) : drawNode(row.cells[column(when, lane) - 1], when, id, side);
    }).join(`<div class="side-${when[0]}" aria-hidden="true"></div>`)).join('<div class="split" aria-hidden="true"></div>');
    const aria = header ? ` aria-level="${group.depth + 1}" aria-expanded="${row.open}"` : ` aria-level="${group.depth + 2}"`;
    return `<div class="row ${header && group.depth === 0 ? "top" : ""}" role="row" aria-rowindex="${k + 1}"${aria} style="top:${k * rowHeight()}px">${gutter}${cells}</div>`;
  }

  function drawSummary(group, figures, id, side) {
    // Bars compare the modules of one parent, and forward with backward, before with after.
    const heaviest = (group.parent.heaviest ??= Math.max(1, ...group.parent.children.flatMap((child) => child.figures.flat()).map((other) => other.flops)));
    const parts = CLASSES.map((name) => ["c-" + name, figures.classes[name] / heaviest]).filter(([, part]) => part);
    const text = figures.ops ? fixed(figures.ops, 0) + (figures.ops === 1 ? " op" : " ops") : figures.inputs ? fixed(figures.inputs, 0) + (figures.inputs === 1 ? " value" : " values") : "";
    return `<div class="cell summary ${side}" id="${id}" role="gridcell"><span class="ops">${text}</span>${parts.length ? track(parts) : ""}<span class="flops">${figures.flops ? flops(figures.flops).replace("FLOP", "F") : ""}</span></div>`;
  }

  function statusOf(entry, when) {
    if (when === "before" && (entry.status === "new" || entry.status === "hoisted")) return "";
    return entry.status;
  }

  function drawNode(entry, when, id, side) {
    const node = entry && entry[when];
    if (!node) return `<div class="${side}" id="${id}" role="gridcell"></div>`;
    const status = statusOf(entry, when), selected = state.selected;
    const classes = ["cell node", side, status];
    if (node.weight_grad) classes.push("weight_grad");
    if (node.savedFor.length) classes.push("saved");
    if (entry === selected) classes.push("selected");
    else if (selected && selected[when] && (selected[when].inputs.includes(node.index) || selected[when].users.includes(node.index))) classes.push("related");
    const [mark, words] = STATUS[status] || ["", ""];
    const stem = node.name.replace(/_\d+$/, ""); // where there is no room for the name, its number stays
    const figure = node.flops ? flops(total(node.flops)).replace("FLOP", "F") : node.savedFor.length ? bytes(node.bytes) : "";
    const label = [node.name, node.op, when, words, node.weight_grad ? "weight gradient" : "", node.savedFor.length ? "saved for backward, " + bytes(node.bytes) : ""].filter(Boolean).join(", ");
    return `<div class="${classes.join(" ")}" id="${id}" role="gridcell" data-node="${escaped(entry.name)}" aria-selected="${entry === selected}" aria-label="${escaped(label)}" title="${escaped(node.op + (node.value ? "  " + node.value : ""))}">${mark ? `<span class="mark">${mark}</span>` : ""}<span class="name"><span>${escaped(stem)}</span>${escaped(node.name.slice(stem.length))}</span><span class="fig">${figure}</span></div>`;
  }

  function drawEdges(when, first, last) {
    const height = rowHeight(), width = matchMedia("(max-width: 1100px)").matches ? 34 : 60;
    let marked = false;
    const paths = [];
    for (const line of lines[when]) {
      if (Math.max(line.from, line.to) < first || Math.min(line.from, line.to) > last) continue;
      const on = state.selected && line.ends.has(state.selected);
      marked = marked || on;
      const y = (line.from + 0.5) * height, z = (line.to + 0.5) * height, bend = width * 0.55;
      const thick = 1 + 4.5 * Math.sqrt(Math.min(1, line.bytes / fattest));
      paths.push(`<path class="${on ? "on" : ""}" stroke-width="${thick.toFixed(1)}" d="M1 ${y}C${bend} ${y} ${width - bend} ${z} ${width - 1} ${z}"/>`);
    }
    return `<svg class="${when[0]} side-${when[0]} ${marked ? "some" : ""}">${paths.join("")}</svg>`;
  }

  function toggle(group) {
    if (state.matches) return;
    group.open = !group.open;
    relayout();
  }

  function select(name, quiet) {
    const entry = entries.get(name);
    if (!entry) return;
    state.selected = entry;
    if (state.matches && !state.matches.has(entry)) search("");
    if (state.view !== "both" && !entry[state.view]) setView("both");
    if (!quiet && decodeURIComponent(location.hash.slice(1)) !== name) history.pushState(null, "", "#" + encodeURIComponent(name));
    for (let group = entry.group; group; group = group.parent) group.open = true;
    relayout();
    reveal(entry);
    showDetails();
    moveReading(entry);
  }

  function reveal(entry) {
    const row = layout.rowOf.get(entry);
    if (row === undefined) return;
    const when = state.view === "both" ? (entry.after && !(entry.before && state.cursor.column === 1 + entry.lane) ? "after" : "before") : state.view;
    state.cursor = { row, column: layout.rows[row].cells ? 1 + SIDES.indexOf(when) * 2 + entry.lane : 0 };
    scrollToRow(row);
    draw(true);
  }

  function scrollToRow(row) {
    const y = $("graph").getBoundingClientRect().top + row * rowHeight();
    const upper = $("toolbar").offsetHeight + $("lanes").offsetHeight, sheet = $("details");
    const fixedSheet = getComputedStyle(sheet).position === "fixed" && !sheet.classList.contains("idle");
    const lower = window.innerHeight - (fixedSheet ? sheet.offsetHeight : 0);
    if (y < upper + 8) window.scrollBy(0, y - upper - 60);
    else if (y + 2 * rowHeight() > lower) window.scrollBy(0, y - lower + 120);
  }

  function onGraphClick(event) {
    const node = event.target.closest("[data-node]"), cell = event.target.closest("[id^=c]");
    if (!cell) return;
    const [row, column] = cell.id.slice(1).split("-").map(Number);
    state.cursor = { row, column };
    $("graph").focus({ preventScroll: true });
    if (node) select(node.dataset.node);
    else if (layout.rows[row].summary || column === 0) toggle(layout.rows[row].group);
    else draw(true);
  }

  function columnsOf(row) {
    const found = [0];
    const { cells } = layout.rows[row];
    if (cells) cells.forEach((entry, k) => { if (entry) found.push(1 + k); });
    return found;
  }

  function moveTo(row, column) {
    if (!layout.rows.length) return;
    row = Math.max(0, Math.min(layout.rows.length - 1, row));
    const possible = columnsOf(row);
    const nearest = possible.reduce((best, c) => (Math.abs(c - column) < Math.abs(best - column) ? c : best), possible[0]);
    state.cursor = { row, column: nearest };
    scrollToRow(row);
    draw(true);
  }

  function onGraphKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { row, column } = state.cursor, current = layout.rows[row];
    if (!current) return;
    const page = Math.floor(window.innerHeight / rowHeight()) - 8;
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 };
    if (event.key in moves) moveTo(row + moves[event.key], column);
    else if (event.key === "ArrowRight") {
      const next = columnsOf(row).find((c) => c > column);
      if (next !== undefined) moveTo(row, next);
      else if (current.summary && !current.open) toggle(current.group);
      else moveTo(row + 1, column);
    } else if (event.key === "ArrowLeft") {
      const next = columnsOf(row).filter((c) => c < column).pop();
      if (next !== undefined) moveTo(row, next);
      else if (current.open && (current.summary || current.first) && !state.matches) toggle(current.group);
      else if (current.group.parent && layout.rowOf.has(current.group.parent)) moveTo(layout.rowOf.get(current.first || current.summary ? current.group.parent : current.group), 0);
    } else if (event.key === "Enter" || event.key === " ") {
      const entry = column && current.cells ? current.cells[column - 1] : null;
      if (entry) select(entry.name);
      else toggle(current.group);
    } else return;
    event.preventDefault();
  }

  // --- Details

  function showDetails() {
    const entry = state.selected;
    $("details").classList.toggle("idle", !entry);
    $("details").innerHTML = `<div>${entry ? describe(entry) : legend()}</div>`;
    $("details").scrollTop = 0;
    const close = $("details").querySelector(".close");
    if (close) close.addEventListener("click", closeDetails);
  }

  function closeDetails() {
    state.selected = null;
    history.replaceState(null, "", location.pathname + location.search);
    showDetails();
    draw(true);
    $("graph").focus({ preventScroll: true });
  }

  function legend() {
    const item = (status, text, extra) => `<span class="cell node ${status} ${extra || ""}"><span class="mark">${(STATUS[status] || [""])[0]}</span><span class="name">${status === "kept" ? "kept" : "node"}</span></span><span>${text}</span>`;
    return `<h2>How to read this</h2><p>Forward runs down, backward runs up. A line is a tensor that forward saves for backward, as thick as it is large.</p><div class="legend">` +
      item("removed", "removed: a weight gradient", "weight_grad") + item("removed", "removed: no output depends on it") + item("rewritten", "replaced by another operator") + item("narrowed", "computes less, or from less") +
      item("hoisted", "computed once per attack") + item("new", STATUS.new[1]) + (find("is:kept").size ? item("kept", "left as it was, and why") : "") + item("", "saved for backward", "saved") +
      "</div><p class=\"empty\" style=\"margin-top:12px\">Choose a node, here or in the curve. <kbd>?</kbd> lists the keys.</p>";
  }

  function describe(entry) {
    const sides = SIDES.filter((when) => entry[when]);
    const both = (label, show, code) => {
      const values = sides.map((when) => show(entry[when], data[when]));
      if (!values.some(Boolean)) return "";
      const same = values.length === 2 && values[0] === values[1];
      const cells = same ? `<td colspan="2" class="${code || ""}">${escaped(values[0])}</td>` : values.map((value) => `<td class="${code || ""}">${escaped(value || "\u2013")}</td>`).join("");
      return `<tr><th scope="row">${label}</th>${cells}</tr>`;
    };
    const node = entry.after || entry.before, [, words] = STATUS[entry.status] || ["", ""];
    const reasons = entry.changes.map((change) => `<div class="reason ${change.kind}">${escaped(change.reason)}<small>${DID[change.kind]} by ${escaped(change.pass)}</small></div>`).join("");
    let state_ = words;
    if (entry.status === "removed" && !reasons) state_ = data.gone[entry.name] || "removed: nothing reads it after what the passes did around it";
    if (entry.status === "hoisted" && !reasons) state_ = "hoisted: what is computed once per attack is computed from it";
    return `<button type="button" class="close" aria-label="Close the details">\u00d7</button><h2>${escaped(entry.name)}</h2>` +
      `<p class="op">${escaped(node.op)}</p><p>${escaped([entry.path && !entry.path.startsWith("(") ? entry.path : entry.path.slice(1, -1) || "model", entry.type].filter(Boolean).join(" \u00b7 "))}</p>` +
      (state_ || entry.weightGradient ? `<h3>What happened</h3><p>${escaped([state_, entry.weightGradient ? "leads to weight gradients only" : ""].filter(Boolean).join("; "))}</p>` : "") + reasons +
      `<table><thead><tr><td></td>${sides.map((when) => `<th scope="col">${when}${sides.length < 2 ? " only" : ""}</th>`).join("")}</tr></thead><tbody>` +
      both("phase", (n) => n.phase) + both("role", (n) => n.role || "") + both("value", (n) => n.value || "", "code") +
      both("bytes", (n) => (n.bytes ? bytes(n.bytes) + (n.view ? ", a view" : "") : "")) +
      CLASSES.map((name) => both(CLASS_NAMES[name], (n) => (n.flops && n.flops[name] ? flops(n.flops[name]) : ""))).join("") +
      both("saved", (n) => (n.savedFor.length ? "for " + n.savedFor.length + (n.savedFor.length === 1 ? " reader" : " readers") : "")) +
      both("step", (n, graph) => { const k = graph.calls.indexOf(n); return k < 0 ? "" : `${fixed(k + 1, 0)} of ${fixed(graph.calls.length, 0)}`; }) +
      both("alive", (n, graph) => { const k = graph.calls.indexOf(n); return k < 0 ? "" : bytes(graph.memory[k]); }) +
      `</tbody></table>` + need(entry) + (entry.source ? `<h3>Source</h3><p class="source">${escaped(entry.source)}</p>` : "") +
      links("Saved for", entry, "savedFor") + links("Reads what forward saved", entry, "reads") + links("Inputs", entry, "inputs") + links("Users", entry, "users");
  }

  // The shortest way from a node to what is returned, to a weight gradient only if to nothing else.
  function need(entry) {
    const when = entry.after ? "after" : "before", { nodes } = data[when], from = new Map([[entry[when].index, null]]);
    for (const index of from.keys()) // to which the loop adds
      for (const user of nodes[index].users) if (!from.has(user)) from.set(user, index);
    const ends = [...from.keys()].filter((index) => (nodes[index].role || "").startsWith("returned"));
    const end = ends.find((index) => !nodes[index].weight_grad) ?? ends[0];
    if (end === undefined || end === entry[when].index) return "";
    const path = [];
    for (let index = end; index !== entry[when].index; index = from.get(index)) path.unshift(index);
    const link = (index) => `<a href="#${encodeURIComponent(nodes[index].name)}">${escaped(nodes[index].name)}</a>`;
    const shown = path.length > 4 ? [link(path[0]), `${path.length - 2} more`, link(end)] : path.map(link);
    return `<h3>${entry.after ? "Needed for" : "Was read for"}</h3><p class="path">${shown.join(" \u2192 ")}, ${escaped(nodes[end].role)}</p>`;
  }

  // Nodes at the other end of edges, those of both graphs in one list.
  function links(title, entry, field) {
    const found = new Map();
    for (const when of SIDES)
      for (const index of entry[when] ? entry[when][field] : []) {
        const other = data[when].nodes[index];
        if (!found.has(other.entry)) found.set(other.entry, []);
        found.get(other.entry).push(when);
      }
    if (!found.size) return field === "inputs" || field === "users" ? `<h3>${title}</h3><p class="empty">none</p>` : "";
    const items = [...found].slice(0, 200).map(([other, sides]) => {
      const only = sides.length === 1 || sides[0] === sides[sides.length - 1] ? sides[0] : "";
      const value = (other.after || other.before).value || "";
      const note = entry.before && entry.after && only ? only + " only" : value.length < 34 ? value : "";
      return `<li class="${only === "before" && entry.after ? "gone" : ""}"><a href="#${encodeURIComponent(other.name)}">${escaped(other.name)}</a><small>${escaped(note)}</small></li>`;
    });
    return `<h3>${title}</h3><ul>${items.join("")}</ul>${found.size > 200 ? `<p class="empty">and ${found.size - 200} more</p>` : ""}`;
  }

  // --- Events of the whole page

  function measureToolbar() {
    document.documentElement.style.setProperty("--toolbar", $("toolbar").offsetHeight + "px");
  }

  measureToolbar();
  let frame = 0;
  const soon = () => { frame = frame || requestAnimationFrame(() => { frame = 0; draw(false); }); };
  window.addEventListener("scroll", soon, { passive: true });
  window.addEventListener("resize", () => { measureToolbar(); draw(true); });
  window.addEventListener("popstate", () => select(decodeURIComponent(location.hash.slice(1)), true));
  $("graph").addEventListener("click", onGraphClick);
  $("graph").addEventListener("keydown", onGraphKey);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    if (event.key === "Escape" && state.selected) closeDetails();
    else if (event.target.matches("input")) return;
    else if (event.key === "/") $("search").focus();
    else if (event.key === "?") $("help").showModal();
    else if (event.key === "t") toggleTheme();
    else if (event.key === "n") step(1);
    else if (event.key === "p") step(-1);
    else if (event.key === "e") setOpen(true);
    else if (event.key === "c") setOpen(false);
    else if (event.key === "b") setView({ both: "before", before: "after", after: "both" }[state.view]);
    else return;
    event.preventDefault();
  });
}
