// The modules of the model, and which of them are open.

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
