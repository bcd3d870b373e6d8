// Numbers as text.

const SIDES = ["before", "after"];
const CLASSES = ["forward", "input_grad", "weight_grad", "other"];
const CLASS_NAMES = { forward: "forward", input_grad: "input gradient", weight_grad: "weight gradient", other: "other" };
const FORWARD = 0, BACKWARD = 1;
const STATUS = {
  removed: ["\u2212", "removed"],
  rewritten: ["\u223c", "replaced by another operator"],
  narrowed: ["\u25d0", "narrowed: computes less, or from less"],
  hoisted: ["\u21e1", "hoisted: computed once per attack"],
  new: ["+", "put in by a pass"],
  kept: ["!", "kept, although it computes more than is used"],
};
const DID = { removed: "removed", narrowed: "narrowed", hoisted: "hoisted", skipped: "kept" };

function unitOf(largest) {
  for (const [unit, prefix] of [[1e12, "T"], [1e9, "G"], [1e6, "M"]]) if (largest >= unit) return [unit, prefix];
  return [1e3, "k"];
}

function fixed(value, digits) {
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function amount(value, what) {
  if (!value) return "0 " + what;
  if (value < 1000) return value + " " + what;
  const [unit, prefix] = unitOf(value);
  const scaled = value / unit;
  return fixed(scaled, scaled < 10 ? 2 : scaled < 100 ? 1 : 0) + " " + prefix + what;
}

const bytes = (value) => amount(value, "B");
const flops = (value) => amount(value, "FLOP");
const sum = (values) => values.reduce((total, value) => total + value, 0);
const most = (values) => values.reduce((largest, value) => Math.max(largest, value), 1);
const total = (classes) => (classes ? sum(Object.values(classes)) : 0);

function escaped(text) {
  return String(text).replace(/[&<>"']/g, (c) => "&#" + c.charCodeAt(0) + ";");
}
