// What is known about the node that is selected.

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
