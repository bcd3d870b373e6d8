"""The page: one file, whatever the names in it; what it shows, in a browser."""

from __future__ import annotations

import html.parser
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser, find_browser
from capture import Graph, step_graphs
from torch import Tensor, nn

from gradprune.emit.record import Call, Emission, Kernel, Part, Request
from gradprune.inspect import page as page_module
from gradprune.inspect.page import add_emission, page, write_page
from gradprune.passes.base import Change, PassResult, Tier
from gradprune.passes.pipeline import PassRecord
from gradprune.report.report import Report
from gradprune.workloads.vision import let_torchvision_import

Graphs = tuple[Report, Graph, Graph]

UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}

NASTY = "</script><!--<script>\"'&\u2028é模"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.norm1(self.conv1(x))))


@pytest.fixture(scope="module")
def graphs() -> Graphs:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block() for _ in range(4)))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), blocks, nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)).eval()
    x = torch.rand(2, 3, 8, 8)
    return step_graphs(model, x, x.clone(), torch.tensor([1, 3]))


@pytest.fixture(scope="module")
def file(graphs: Graphs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, *graphs)
    return path


# --- The file ---------------------------------------------------------------------------------------------------------


class Reader(html.parser.HTMLParser):
    """Collects tags with their attributes and the text of scripts, as a browser would find them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.scripts:
            self.scripts[-1] += data if self.lasttag == "script" else ""

    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])  # type: ignore[no-any-return]


def test_holds_the_report_and_the_graphs(graphs: Graphs, file: Path):
    report, before, after = graphs
    data = Reader(file.read_text(encoding="utf-8")).data()
    assert (data["before"], data["after"]) == (before, after)
    assert data["report"] == {
        "ops": report.ops,
        "flops": report.flops,
        "saved_bytes": report.saved_bytes,
        "peak_bytes": report.peak_bytes,
    }
    assert [record["name"] for record in data["passes"]] == [record.name for record in report.passes]


def test_needs_nothing_else(file: Path):
    text = file.read_text(encoding="utf-8")
    reader = Reader(text)
    for tag, attributes in reader.tags:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith(("#", "data:")), attributes
    style, _, rest = text.partition('<script type="application/json"')
    style_and_script = style + rest.partition("</script>")[2]
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|fetch\(|XMLHttpRequest|import\(", style_and_script)
    (policy,) = [a["content"] for _, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def renamed(graphs: Graphs) -> Graphs:
    """With names and texts that would break out of wherever they are put unescaped."""
    report, before, after = json.loads(json.dumps([None, *graphs[1:]]))
    for graph in (before, after):
        graph["sources"] = [f"{NASTY}{source}" for source in graph["sources"]]
        for module in graph["modules"]:
            module["type"] += NASTY
        for node in graph["nodes"]:
            if node["op"] == "aten.sign":
                node["name"] = NASTY
    change = Change(NASTY, "aten.sign", NASTY, f"<img src=x onerror=alert(1)>{NASTY}")
    record = PassRecord(NASTY, Tier.EXACT, 0.0, 1, 1, PassResult(narrowed=[change]))
    report = replace(graphs[0], passes=[*graphs[0].passes, record], fallback=NASTY)
    return report, before, after


def test_texts_stay_texts(graphs: Graphs):
    text = page(*renamed(graphs))
    reader = Reader(text)
    assert len(reader.scripts) == 2
    assert text.count("<!--") == 0
    assert reader.data()["fallback"] == f"Compiled as captured: {NASTY}"
    assert NASTY in {node["name"] for node in reader.data()["before"]["nodes"]}


def test_is_there_when_it_is_complete(graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "page.html"
    write_page(path, *graphs)
    complete = path.read_bytes()

    def full_disk(self: Path, text: str, **options: Any) -> int:
        self.write_bytes(text[:1000].encode())
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        with pytest.raises(OSError, match="No space left"):
            write_page(path, *graphs)
    assert path.read_bytes() == complete
    assert list(tmp_path.iterdir()) == [path]


def emission() -> dict[str, Any]:
    calls = [
        Call(NASTY, "external", {"a": 4_000_000}, {"b": 2_000_000}, 5_000_000, "fp32", 2e-5),
        Call("triton_poi_fused_0", "generated", {"b": 2_000_000}, {"c": 1_000_000}, 0, "fp32", 1e-5, {0: 2_000_000}),
    ]
    config = {"stack_bytes": 0, "shared_bytes": 4096, "occupancy": 0.5}
    configs = [{**config, "registers": 18}, {**config, "registers": 32, "stack_bytes": 8}]
    request = Request("digits", "sm_75")
    parts = [Part("step", calls, 3_000_000, 1_000_000)]
    return Emission(request, "Tesla T4", {}, "", parts, [Kernel("triton_poi_fused_0", "step", configs)]).to_dict()


def test_emission_is_added(graphs: Graphs, tmp_path: Path):
    path = tmp_path / "page.html"
    write_page(path, *graphs)
    before = Reader(path.read_text()).data()
    add_emission(path, emission())
    after = Reader(path.read_text()).data()
    assert after.pop("emission") == json.loads(json.dumps(emission()))
    assert after == before
    assert list(tmp_path.iterdir()) == [path]


def test_report_without_figures_after_the_passes(graphs: Graphs):
    report, before, _ = graphs
    text = page(
        replace(report, _figures={"before": report.figures()["before"]}, fallback="a pass failed"), before, before
    )
    ops = before["totals"]["ops"]
    assert Reader(text).data()["report"]["ops"] == {"before": ops, "after": ops}


def themes() -> dict[str, dict[str, str]]:
    style = page_module._asset("page.css")
    names = {"light": r":root \{(.*?)\}", "dark": r':root\[data-theme="dark"\] \{(.*?)\}'}
    blocks = {theme: re.search(pattern, style, re.DOTALL) for theme, pattern in names.items()}
    return {theme: dict(re.findall(r"--(\w+): (#\w{6})", block[1])) for theme, block in blocks.items() if block}


def luminance(colour: str) -> float:
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(theme: str):
    colours = themes()[theme]
    texts = ("ink", "muted", "accent", "removed", "narrowed", "hoisted", "new", "kept")
    for text, ground in itertools.product(texts, ("page", "card", "raised")):
        low, high = sorted((luminance(colours[text]), luminance(colours[ground])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


# --- Its functions, where there is node ------------------------------------------------------------------------------

CHECKS = """
const data = JSON.parse(require("fs").readFileSync(0, "utf8"));
const entries = prepare(data), root = buildTree(entries);
const open = (group) => { group.open = true; group.children.forEach(open); };
openSome(root);
const folded = flatten(root, null, "both");
open(root);
const all = flatten(root, null, "both"), only = flatten(root, null, "after");
const shown = (layout, k) => layout.rows.flatMap((row) => (row.cells && row.cells[k] ? [row.cells[k].name] : []));
const some = new Set([...entries.values()].filter((entry) => entry.status === "hoisted"));
console.log(JSON.stringify({
  entries: [...entries.values()].map((entry) => [entry.name, entry.status, entry.path]),
  lanes: [0, 1, 2, 3].map((k) => shown(all, k)),
  only: [0, 1, 2, 3].map((k) => shown(only, k)),
  matching: [0, 1, 2, 3].map((k) => shown(flatten(root, some, "both"), k)),
  beside: all.rows.filter((row) => row.cells).map((row) => row.cells.map((entry) => entry && entry.name)),
  missing: [...entries.values()].filter((entry) => !folded.rowOf.has(entry)).map((entry) => entry.name),
  groups: folded.rows.filter((row) => row.summary || row.first).map((row) => row.group.label),
  edges: connections(data.before, all).map((line) => line.bytes),
  bundled: connections(data.before, folded).length,
}));
"""


def test_layout(graphs: Graphs, file: Path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on the search path")
    _, before, after = graphs
    data = Reader(file.read_text(encoding="utf-8")).scripts[0]
    script = "".join(page_module._asset(f"{name}.js") for name in page_module.MODULES[:4]) + CHECKS
    done = subprocess.run([node, "-e", script], input=data, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)

    # Every node is shown once on each side that has it.
    sides = [{node["name"] for node in graph["nodes"]} for graph in (before, after)]
    for names, lanes in zip(sides, (seen["lanes"][:2], seen["lanes"][2:]), strict=True):
        assert sorted(itertools.chain(*lanes)) == sorted(names)
    assert seen["only"][:2] == [[], []]
    assert sorted(itertools.chain(*seen["only"][2:])) == sorted(sides[1])
    assert seen["missing"] == []
    # What is in both graphs stands in one row.
    for forward, backward, forward_after, backward_after in seen["beside"]:
        assert forward not in sides[1] or forward == forward_after
        assert backward not in sides[1] or backward == backward_after
    # The backward pass runs upwards.
    order = [node["name"] for node in before["nodes"] if node["op"] == "aten.convolution_backward"]
    assert [name for name in seen["lanes"][1] if name in order] == order[::-1]

    status = {name: status for name, status, _ in seen["entries"]}
    assert {name for name, what in status.items() if what in ("removed", "rewritten")} == sides[0] - sides[1]
    assert all(status[node["name"]] == "removed" for node in before["nodes"] if node.get("weight_grad"))
    hoisted = {node["name"] for node in after["nodes"] if node.get("prologue")}
    assert {name for name, what in status.items() if what == "hoisted"} == hoisted
    assert set(itertools.chain(*seen["matching"])) == hoisted
    assert seen["groups"][:4] == ["(inputs)", "(update)", "(before the model)", "0"]
    assert sum(seen["edges"]) >= before["totals"]["saved_bytes"]
    assert 0 < seen["bundled"] <= len(seen["edges"])


# --- In a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium: none on the search path, in $CHROMIUM or installed by playwright")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def texts(browser: Browser, selector: str) -> list[str]:
    found: list[str] = browser.evaluate(
        f"[...document.querySelectorAll({json.dumps(selector)})].map((element) => element.innerText.trim())"
    )
    return found


def type_in(browser: Browser, text: str) -> None:
    browser.press("/", *text)


@pytest.fixture(params=[(1400, False), (800, False), (1400, True), (800, True)], ids=lambda p: f"{p[0]}-{p[1]}")
def opened(request: pytest.FixtureRequest, browser: Browser, file: Path) -> Iterator[Browser]:
    width, dark = request.param
    browser.open(file, width=width, dark=dark)
    yield browser
    assert browser.errors() == []


def test_totals_are_those_of_the_report(browser: Browser, graphs: Graphs, file: Path):
    browser.open(file)
    rows = {row.split("\t")[0]: row.split("\t")[1:3] for row in texts(browser, "#figures tbody tr")}
    report = graphs[0]
    totals = {when: sum(classes.values()) for when, classes in report.flops.items()}
    classes = {"forward": "forward", "input gradient": "input_grad", "weight gradient": "weight_grad"}
    (prefix,) = [label[0] for label in rows if label.endswith("FLOP")]
    expected = {"operators": (report.ops, 1, 0), f"{prefix}FLOP": (totals, UNITS[prefix], 2)}
    for label, name in classes.items():
        expected[label] = ({when: of[name] for when, of in report.flops.items()}, UNITS[prefix], 2)
    for label in rows.keys() - expected.keys():
        figures = {"B saved for backward": report.saved_bytes, "B peak, unfused": report.peak_bytes}
        expected[label] = (figures[label[1:]], UNITS[label[0]], 1)
    assert len(rows) == 7
    for label, (figure, unit, digits) in expected.items():
        assert rows[label] == [f"{figure[when] / unit:,.{digits}f}" for when in ("before", "after")], label


def test_search_and_selection(opened: Browser, graphs: Graphs):
    type_in(opened, "is:weight-gradient convolution_backward")
    assert opened.evaluate("document.activeElement.id") == "search"
    type_in(opened, "")
    assert texts(opened, "#matches") == ["0 nodes"]
    opened.press("Escape")
    assert texts(opened, "#matches") == [""]

    type_in(opened, "relu_2")
    names = opened.evaluate("[...document.querySelectorAll('#graph .node')].map((node) => node.dataset.node)")
    assert set(names) == {"relu_2"}
    assert texts(opened, "#matches") == ["1 node"]
    opened.press("Enter")
    assert texts(opened, "#details h2") == ["relu_2"]
    details = opened.evaluate("document.getElementById('details').innerText")
    relu = next(node for node in graphs[1]["nodes"] if node["name"] == "relu_2")
    assert "1.2.act" in details
    assert relu["value"] in details
    assert graphs[1]["sources"][relu["source"]] in details
    assert opened.evaluate("location.hash") == "#relu_2"

    # Links lead on, and the browser's history leads back.
    opened.evaluate("document.querySelector('#details li a').click()")
    opened.wait(lambda: texts(opened, "#details h2") != ["relu_2"])
    assert texts(opened, "#details h2")[0].startswith("convolution")
    opened.evaluate("history.back()")
    opened.wait(lambda: texts(opened, "#details h2") == ["relu_2"])
    opened.press("Escape")
    opened.press("Escape")
    assert "idle" in opened.evaluate("document.getElementById('details').className")


def test_reasons_are_shown(opened: Browser, graphs: Graphs):
    narrowed = next(record for record in graphs[0].passes if record.name == "narrow-outputs").result.narrowed[0]
    opened.evaluate(f"location.hash = {json.dumps('#' + narrowed.node)}")
    opened.wait(lambda: texts(opened, "#details h2") == [narrowed.node])
    details = opened.evaluate("document.getElementById('details').innerText")
    assert f"{narrowed.reason}\nnarrowed by narrow-outputs" in details
    assert "returned\n" in details
    assert "weight gradient\n" not in details.partition("Was read for")[2]
    assert opened.evaluate("document.querySelector('.node.selected').dataset.node") == narrowed.node

    gradient = next(change for change in graphs[0].removed if change.reason.startswith("weight gradient"))
    opened.evaluate(f"location.hash = {json.dumps('#' + gradient.node)}")
    opened.wait(lambda: texts(opened, "#details h2") == [gradient.node])
    struck = opened.evaluate("getComputedStyle(document.querySelector('.node.selected .name')).textDecorationLine")
    assert struck == "line-through"
    assert "removed by select-outputs" in opened.evaluate("document.getElementById('details').innerText")


def test_theme(opened: Browser):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = (tuple(int(c[k : k + 2], 16) for k in (1, 3, 5)) for c in (t["page"] for t in themes().values()))
    colours = [f"rgb{colour}" for colour in (light, dark)]
    start = opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert opened.evaluate(ground) == colours[start]
    opened.click("#theme")
    assert opened.evaluate(ground) == colours[not start]
    opened.press("t")
    assert opened.evaluate(ground) == colours[start]
    opened.evaluate("localStorage.clear()")


def test_folding_and_views(opened: Browser):
    opened.press("c")
    folded = int(opened.evaluate("document.getElementById('graph').getAttribute('aria-rowcount')"))
    opened.press("e")
    rows = int(opened.evaluate("document.getElementById('graph').getAttribute('aria-rowcount')"))
    assert folded < 12 < rows
    opened.press("b")
    assert opened.evaluate("document.getElementById('explorer').dataset.view") == "before"
    assert opened.evaluate("document.querySelectorAll('#graph .node.side-a').length") == 0
    opened.press("b", "b")
    assert opened.evaluate("document.getElementById('explorer').dataset.view") == "both"


def test_keyboard(opened: Browser):
    active = "(document.getElementById(document.getElementById('graph').getAttribute('aria-activedescendant')) || {})"
    opened.evaluate("document.getElementById('graph').focus()")
    opened.press("c", "Home")
    assert opened.evaluate(f"{active}.innerText").split()[-1] == "(inputs)"
    opened.press("ArrowRight")  # opens it
    assert opened.evaluate(f"{active}.parentElement.getAttribute('aria-expanded')") == "true"
    opened.press("ArrowRight", "Enter")
    assert opened.evaluate(f"{active}.dataset.node") == "arg0_1"
    assert texts(opened, "#details h2") == ["arg0_1"]
    opened.press("ArrowLeft", "ArrowLeft")
    assert opened.evaluate(f"{active}.parentElement.getAttribute('aria-expanded')") == "false"
    opened.press("End", "?")
    assert opened.evaluate("document.getElementById('help').open") is True
    opened.press("Escape")
    assert opened.evaluate("document.getElementById('help').open") is False


def test_saved_tensors_are_drawn(opened: Browser, graphs: Graphs):
    opened.evaluate("document.getElementById('explorer').scrollIntoView()")
    lines = "document.querySelectorAll('#edges svg.{} path').length"
    assert opened.evaluate(lines.format("b")) > 0
    assert opened.evaluate(lines.format("a")) > 0
    boxes = opened.evaluate(
        "['#edges svg.b', '#graph .row .side-b'].map((selector) => document.querySelector(selector))"
        ".map((element) => element.getBoundingClientRect()).map(({ left, right }) => [left, right])"
    )
    (edge, end), (_, cell) = boxes
    assert abs(cell - edge) < 2  # from the edge of the forward lane
    assert end - edge > 30


def test_curve(opened: Browser, graphs: Graphs):
    assert opened.evaluate("document.querySelectorAll('#chart path.line').length") == 2
    opened.evaluate("document.getElementById('chart').focus()")
    opened.press("End")
    last = [node["name"] for node in graphs[2]["nodes"] if node["phase"] != "output"][-1]
    assert last in texts(opened, "#reading")[0]
    opened.press("Enter")
    assert texts(opened, "#details h2") == [last]


def test_calls_on_a_gpu_are_listed(browser: Browser, graphs: Graphs, file: Path, tmp_path: Path):
    browser.open(file)
    assert texts(browser, "#gpu details") == []
    path = tmp_path / "page.html"
    write_page(path, *graphs)
    add_emission(path, emission())
    browser.open(path)
    (summary,) = texts(browser, "#gpu summary")
    assert "Tesla T4 1 launches of 1 generated kernels, 1 calls of libraries, 9.00 MB moved" in summary
    assert "static estimate" in summary
    browser.evaluate("document.querySelector('#gpu details').open = true")
    external, generated = (row.split("\t") for row in texts(browser, "#gpu tbody tr"))
    assert external[1:6] == [NASTY, "", "4.00 MB", "2.00 MB", "5.00 MFLOP"]
    assert generated[1:7] == ["poi_fused_0", "0", "2.00 MB", "1.00 MB", "", "10.0"]
    assert generated[8:] == ["18\u201332", "8", "4,096", "0.50"]
    assert browser.errors() == []


def test_nasty_texts(browser: Browser, graphs: Graphs, tmp_path: Path):
    path = tmp_path / "page é.html"
    write_page(path, *renamed(graphs))
    browser.open(path)
    assert texts(browser, "#fallback") == [f"Compiled as captured: {NASTY}"]
    browser.evaluate(f"location.hash = '#' + encodeURIComponent({json.dumps(NASTY)})")
    browser.wait(lambda: texts(browser, "#details h2") == [NASTY])
    assert f"narrowed by {NASTY}" in browser.evaluate("document.getElementById('details').innerText")
    assert browser.evaluate("document.querySelectorAll('#explorer img, #overview img').length") == 0
    assert browser.errors() == []


# --- A large network --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_large_network(tmp_path: Path, request: pytest.FixtureRequest):
    let_torchvision_import()
    timm = pytest.importorskip("timm")
    x = torch.rand(1, 3, 224, 224)
    graphs = step_graphs(timm.create_model("resnet152", pretrained=False).eval(), x, x.clone(), torch.tensor([1]))
    assert graphs[0].ops["before"] > 2000
    path = tmp_path / "page.html"
    write_page(path, *graphs)
    assert path.stat().st_size < 5e6
    browser: Browser = request.getfixturevalue("browser")
    browser.open(path)
    browser.press("e")
    assert int(browser.evaluate("document.getElementById('graph').getAttribute('aria-rowcount')")) > 1500
    # Only what is in view exists, wherever that is.
    for y in (0, 20_000):
        browser.evaluate(f"window.scrollTo(0, {y})")
        browser.wait(lambda: browser.evaluate("document.querySelectorAll('#graph .node').length") > 0)
        assert browser.evaluate("document.querySelectorAll('#graph *').length") < 2000
    assert browser.errors() == []
