// What the step becomes on a GPU: the calls of generated code, in their order.

function drawEmission(emission) {
  const section = $("gpu"), totals = emission.totals.gradprune;
  section.hidden = false;
  const longest = Math.max(1e-9, ...emission.parts.flatMap((part) => part.calls.map((call) => call.seconds)));
  const compiled = new Map(emission.kernels.map((kernel) => [kernel.part + " " + kernel.name, kernel.configs]));
  const moved = totals.generated_bytes + totals.external_bytes;
  const seconds = totals.generated_seconds + totals.external_seconds;
  section.innerHTML =
    `<details class="card"><summary><b>${escaped(emission.gpu)}</b> ` +
    `${totals.launches} launches of ${totals.kernels} generated kernels, ${totals.external} calls of libraries, ${bytes(moved)} moved, ` +
    `${bytes(totals.peak_bytes)} at the peak, ${fixed(seconds * 1e3, 3)} ms by the roofline <em>${escaped(emission.label)}: not run</em></summary>` +
    emission.parts.map((part) => drawPart(part, compiled, longest)).join("") + "</details>";
}

function drawPart(part, compiled, longest) {
  const facts = part.calls.some((call) => compiled.has(part.name + " " + call.name));
  const head = ["", "call", "reads from", "read", "written", "FLOP", "us", ""].concat(facts ? ["registers", "spilled B", "shared B", "occupancy"] : []);
  const rows = part.calls.map((call, position) => {
    const read = sum(Object.values(call.reads)), written = sum(Object.values(call.writes));
    const sources = Object.entries(call.sources).map(([index, size]) => `<span title="${escaped(bytes(size))}">${escaped(index)}</span>`).join(" ");
    const configs = compiled.get(part.name + " " + call.name);
    const bar = track([[call.kind === "generated" ? "c-after" : "c-before", call.seconds / longest]]);
    return `<tr class="${escaped(call.kind)}"><td>${position}</td><th scope="row" title="${escaped(call.name)}">${escaped(call.name.replace(/^triton_/, ""))}</th>` +
      `<td>${sources}</td><td>${bytes(read)}</td><td>${bytes(written)}</td><td>${call.flops ? flops(call.flops) : ""}</td>` +
      `<td>${fixed(call.seconds * 1e6, 1)}</td><td class="bars" aria-hidden="true">${bar}</td>` +
      (facts ? compiledCells(configs) : "") + "</tr>";
  });
  return `<h2>${escaped(part.name)}</h2><div class="wide"><table><thead><tr>${head.map((name) => `<th scope="col">${escaped(name)}</th>`).join("")}</tr></thead><tbody>${rows.join("")}</tbody></table></div>`;
}

function compiledCells(configs) {
  if (!configs) return "<td></td>".repeat(4);
  const registers = configs.map((config) => config.registers);
  const least = Math.min(...registers), highest = Math.max(...registers);
  const largest = (name) => Math.max(...configs.map((config) => config[name]));
  const cells = [least === highest ? least : `${least}\u2013${highest}`, largest("stack_bytes"), fixed(largest("shared_bytes"), 0), fixed(Math.min(...configs.map((config) => config.occupancy)), 2)];
  return cells.map((cell) => `<td>${escaped(cell)}</td>`).join("");
}
