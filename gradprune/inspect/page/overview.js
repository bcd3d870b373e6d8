// Figures, the curve of memory, and the passes.

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
