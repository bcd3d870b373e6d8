// What all of the page shares, and how it begins.

const $ = (id) => document.getElementById(id);
const state = { query: "", matches: null, view: "both", cursor: { row: 0, column: 0 }, selected: null };
let data, entries, root, fattest, layout, lines, moveReading, drawn = "";

function start(graphs) {
  data = graphs;
  entries = prepare(data);
  root = buildTree(entries);
  openSome(root);
  fattest = Math.max(1, ...SIDES.flatMap((when) => data[when].saved.map(([owner]) => data[when].nodes[owner].bytes || 0)));

  $("subtitle").textContent = data.title;
  if (data.fallback) {
    $("fallback").hidden = false;
    $("fallback").textContent = data.fallback;
  }
  drawFigures();
  moveReading = drawMemory();
  drawPasses();
  if (data.emission) drawEmission(data.emission);
  drawToolbar();
  drawHelp();
  setTheme();
  relayout();
  showDetails();
  select(decodeURIComponent(location.hash.slice(1)), true);
  follow();
}

function measureToolbar() {
  document.documentElement.style.setProperty("--toolbar", $("toolbar").offsetHeight + "px");
}

function follow() {
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
