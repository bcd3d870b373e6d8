// Search, filters, and which side is shown.

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
