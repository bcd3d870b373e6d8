// The rows in view: of thousands only those exist as elements. Moving in them by keys and clicks.

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
