// Where everything is: rows, connections of rows, and the curve. All rows have one height, so that where a row is
// follows from its number.

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
