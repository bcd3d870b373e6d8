// Light or dark, and the list of keys.

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
