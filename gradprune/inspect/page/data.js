// One entry for each node name: the node before and after the passes, and what became of it.

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
