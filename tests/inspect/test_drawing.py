"""Drawings show what was captured: parsed back, their texts and shapes are compared with the graph."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import networkx as nx
import pytest
import torch
from torch import nn

import qcompile
from qcompile.__main__ import main as command_line
from qcompile.inspect.drawing.layered import layered
from qcompile.inspect.drawing.svg import COLOURS
from qcompile.inspect.modules import rows_of, site_flow
from qcompile.kernels import profit
from qcompile.kernels.profit import Product
from tests.inspect.models import MLP

SVG = "{http://www.w3.org/2000/svg}"


class Gated(nn.Module):
    """A block with two sites that read the same tensor."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(self.gate(x).sigmoid() * self.up(x))


class Layers(nn.Module):
    """Three blocks and a head."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Gated() for _ in range(3)), nn.Linear(16, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def captured():
    recipe = qcompile.get_recipe("int8_tensorwise").replace(skip=("head",))
    return qcompile.capture(Layers(), torch.randn(24, 16), recipe=recipe)


def elements(path, tag):
    return [e for e in ET.parse(path).iter() if e.tag in (tag, SVG + tag)]


def title_of(shape):
    """What a browser shows over the shape."""
    return shape[0].text


# Rows and layout


def test_rows_are_layers():
    gpt = [f"blocks.{i}.{leaf}" for i in range(2) for leaf in ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")] + ["head"]
    assert [(r.name, len(r.sites)) for r in rows_of(gpt)] == [("blocks.0", 4), ("blocks.1", 4), ("head", 1)]
    resnet = ["stem.conv"] + [f"stages.{s}.layers.{i}.layer.{k}.conv" for s in range(2) for i in range(2) for k in range(3)]
    assert [r.name for r in rows_of(resnet)] == ["stem", *(f"stages.{s}.layers.{i}" for s in range(2) for i in range(2))]
    assert [(r.name, r.sites) for r in rows_of(["up", "down"])] == [("", ["up", "down"])]
    assert [r.name for r in rows_of(["0", "2"])] == [""]  # a Sequential of layers is looked at whole
    assert rows_of(["attn:bmm", "attn:bmm_1"])[0].sites == ["attn:bmm", "attn:bmm_1"]


def test_the_flow_of_sites(captured):
    flow = site_flow(captured.first)
    assert set(flow.predecessors("blocks.0.down")) == {"blocks.0.gate", "blocks.0.up"}
    assert set(flow.predecessors("blocks.1.gate")) == {"blocks.0.down"}
    assert set(flow.predecessors("head")) == {"blocks.2.down"}  # the residual's longer way is implied


def test_the_site_graph_follows_the_residual_stream(captured):
    graph = captured.to_networkx()
    assert nx.is_directed_acyclic_graph(graph)
    later = [n for n in graph.predecessors("blocks_2_gate_input_q")]
    assert graph.in_degree(later[0]) == 2  # the block before, and the stream; not every block before
    quantizes = [n for n, kind in graph.nodes(data="kind") if kind == "quantize"]
    assert all(graph.in_degree(n) == 1 for n in quantizes)


def test_a_layout_keeps_nodes_apart_and_ranks_in_order():
    graph = nx.gnp_random_graph(24, 0.12, seed=1, directed=True)
    graph = nx.DiGraph((a, b) for a, b in graph.edges if a < b)
    widths = {n: 30.0 + 5 * (n % 4) for n in graph}
    placed = layered(graph, widths, gap=10)
    for a, b in graph.edges:
        assert placed.centre[a][1] < placed.centre[b][1]
        assert placed.edges[a, b][0] == placed.centre[a] and placed.edges[a, b][-1] == placed.centre[b]
    for a in graph:
        assert widths[a] / 2 - 1e-6 <= placed.centre[a][0] <= placed.width - widths[a] / 2 + 1e-6
        for b in graph:
            if a < b and placed.centre[a][1] == placed.centre[b][1]:
                assert abs(placed.centre[a][0] - placed.centre[b][0]) >= (widths[a] + widths[b]) / 2 + 10 - 1e-6


# Files


def test_the_overview(captured, tmp_path):
    path = captured.draw(tmp_path / "x.svg")
    texts = [t.text for t in elements(path, "text")]
    rows = [t for t in texts if t in ("blocks.0", "blocks.1", "blocks.2", "head")]
    assert rows == ["blocks.0", "blocks.1", "blocks.2", "head", "head"]  # the head's row and its chip
    assert texts.count("gate") == texts.count("up") == texts.count("down") == 3
    said = {title_of(r): r.get("fill") for r in elements(path, "rect") if len(r)}
    kinds = {name.split(",")[0]: fill for name, fill in said.items()}
    for site, gemm in captured.first.context.gemms():
        expected = COLOURS["integer" if gemm.reason is None else "choice"]
        assert kinds[f"{site.name}.{gemm.role}"] == expected
    assert any("hp: skipped by 'head'" in name for name in said)
    drawn = sum(int(m.group(1).replace(",", "")) for m in (re.match(r"\w+: ([\d,]+) bytes saved", name) for name in said) if m)
    assert 0 < drawn <= captured.saved_bytes().total


def test_a_row_node_by_node(captured, tmp_path):
    path = captured.draw(tmp_path / "x.svg", expand=("blocks.1",))
    titles = {t.text for t in elements(path, "title")}
    graph = captured.to_networkx()
    gemms = [n for n, site in graph.nodes(data="site") if site and site.startswith("blocks.1.")]
    assert len(gemms) == 9 and set(gemms) <= titles
    assert "blocks_1_up_weight_q" in titles and "blocks_0_up_weight_q" not in titles
    saved = {t.split()[3] for t in titles if t and t.startswith("saved for backward: ")}
    assert saved and all(graph.nodes[n]["crosses"] for n in saved)
    with pytest.raises(ValueError, match="no row is called 'blocks.7'; the rows are 'blocks.0'"):
        captured.draw(tmp_path / "x.svg", expand=("blocks.7",))


def test_a_pass_before_and_after(captured, tmp_path):
    path = captured.draw(tmp_path / "x.svg", step="fuse_matmul", site="blocks.1.up")
    outlines = [(title_of(r), r.get("stroke")) for r in elements(path, "rect") if len(r)]
    made = {name for name, stroke in outlines if stroke == COLOURS["added"]}
    gone = {name for name, stroke in outlines if stroke == COLOURS["removed"]}
    assert made == {f"blocks_1_up_{role}_int8" for role in ("output", "grad_input", "grad_weight")}
    assert "blocks_1_up_weight_dq" in gone and not made & gone
    with pytest.raises(ValueError, match="no pass called 'polish' ran; those that did: canonicalize"):
        captured.draw(tmp_path / "x.svg", step="polish")
    with pytest.raises(ValueError, match="no site is called 'nowhere'"):
        captured.draw(tmp_path / "x.svg", step="fuse_matmul", site="nowhere")


def test_the_text_for_graphviz(captured, tmp_path):
    text = captured.draw(tmp_path / "x.dot").read_text()
    graph = captured.to_networkx()
    assert text.count(" -> ") == graph.number_of_edges() and text.count("subgraph cluster_") == 4
    assert text.count("[label=") >= len(graph) and text.rstrip().endswith("}")
    assert text.count("{") == text.count("}")


def test_another_ending_is_refused(captured, tmp_path):
    with pytest.raises(ValueError, match=r"'x.png' ends in '.png'; allowed: .svg, .html, .dot"):
        captured.draw(tmp_path / "x.png")


# Diffs


def test_the_diff_of_a_pass(captured):
    # 3 blocks of 9 GEMMs, less the two input gradients of the first, which nobody needs; the head is skipped.
    lines = captured.diff("fuse_matmul", site="blocks.1.up").splitlines()
    assert re.match(r"fuse_matmul: \d+ changes, 25 nodes made, \d+ removed", lines[0])
    made = [line for line in lines[1:] if line.startswith("+")]
    gone = [line for line in lines[1:] if line.startswith("-")]
    assert sum("qtrain.scaled_mm" in line for line in made) == 3
    assert sum("qtrain.dequantize" in line for line in gone) == 6 and not any("scaled_mm(" in line for line in gone)
    assert captured.diff("find_sites").splitlines()[1].strip().startswith("no node differs")  # new labels are no change
    whole = captured.diff("insert_qdq")
    assert sum("qtrain.quantize" in line for line in whole.splitlines()) == 2 * 25


# Pages


class Page(HTMLParser):
    """Collects tags and refuses what is left open."""

    VOID = {"meta", "br", "link", "input", "img", "hr"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words, self.attributes = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def check_page(text):
    page = Page(text)
    for _tag, name, value in page.attributes:
        assert name not in ("src", "action", "data") and not name.startswith("on")
        assert name != "href" or value.startswith("#")
    assert "@import" not in text and "url(" not in text.replace("url(#arrow)", "")
    return page


HOSTILE = 'x"><script>alert(1)</script>&amp;'


class Hostile(nn.Module):
    """A model whose names are markup."""

    def __init__(self):
        super().__init__()
        self.add_module(HOSTILE, MLP())

    def forward(self, x):
        return self._modules[HOSTILE](x)


Hostile.__name__ = "<b>Hostile</b>"


def chromium():
    return next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


def opened(path, fragment=""):
    """The page's elements after its script has run, in a browser without a network."""
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--proxy-server=127.0.0.1:9"]
    command += ["--virtual-time-budget=2000"]
    return subprocess.run([*command, "--dump-dom", path.as_uri() + fragment], capture_output=True, text=True, timeout=120).stdout


def test_the_page_of_drawings(captured, tmp_path):
    text = captured.draw(tmp_path / "x.html").read_text()
    page = check_page(text)
    assert [v for t, k, v in page.attributes if (t, k) == ("details", "data-row")] == ["blocks.0", "blocks.1", "blocks.2", "head"]
    figures = [v for t, k, v in page.attributes if (t, k) == ("figure", "data-step")]
    assert set(figures) == set(captured.steps)
    sites = {v for t, k, v in page.attributes if (t, k) == ("figure", "data-site")}
    assert {"blocks.0.gate", "blocks.0.down", "head"} <= sites and len(sites) < len(captured.sites)


def test_the_page_of_a_report(tmp_path):
    report = qcompile.explain(MLP(), torch.randn(64, 16), recipe="int8_in_hindsight", timed=True)
    page = check_page(report.to_html(tmp_path / "x.html"))
    words = " ".join(page.words)
    assert report.summary() in words and "5 of 5 GEMMs integer" in words
    for gemm in report.gemms:
        assert " x ".join(map(str, gemm.shape)) in words and f"{1e3 * gemm.seconds:.3f} ms" in words
    assert f"{report.gemms[0].scales['input'].low:.3g}" in words
    assert (tmp_path / "x.html").read_text() == report.to_html()


def test_names_are_escaped(tmp_path):
    recipe = qcompile.get_recipe("int8").replace(grad_input=None)
    model = Hostile()
    with torch.autocast("cpu", torch.bfloat16):
        report = qcompile.explain(model, torch.randn(32, 16), recipe=recipe)
        capture = qcompile.capture(model, torch.randn(32, 16), recipe=recipe)
    for text in (report.to_html(), capture.draw(tmp_path / "x.html").read_text()):
        assert "<script>alert" not in text and "<b>Hostile" not in text
        assert check_page(text).tags.count("script") == 1
    ET.parse(capture.draw(tmp_path / "x.svg"))


@pytest.mark.skipif(chromium() is None, reason="needs Chromium")
def test_the_pages_work_in_a_browser(captured, tmp_path):
    captured.draw(tmp_path / "drawing.html")
    found = opened(tmp_path / "drawing.html", "#row=blocks.1")
    assert 'data-ready="yes"' in found
    assert re.findall(r'<details data-row="([^"]*)" open', found) == ["blocks.1"]
    report = qcompile.explain(Hostile(), torch.randn(32, 16))
    report.to_html(tmp_path / "report.html")
    assert 'data-ready="yes"' in opened(tmp_path / "report.html")


def make():
    return MLP(), torch.randn(64, 16)


def test_the_command_draws_what_it_reports(monkeypatch, tmp_path, capsys):
    def measure(trials, device):
        return {trial: 1.0 if isinstance(trial, Product) and "qtrain" in str(trial.operator) else 1e-3 for trial in trials}

    monkeypatch.setattr(profit, "time_trials", measure)
    path = tmp_path / "model.svg"
    assert command_line(["explain", f"{__name__}:make", "--profit-filter", "--draw", str(path)]) == 0
    assert "0 of 5 GEMMs integer" in capsys.readouterr().out
    assert path.read_text().count("hp: profit filter: measured 1e+03 ms") == 5
