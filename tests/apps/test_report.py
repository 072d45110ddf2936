"""The report: complete, self-contained, the same bytes for the same numbers, written whole."""

import base64
import copy
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from matplotlib import image

from hesskern import files
from hesskern.apps.analyze import digest, figures, report, tables, wording
from hesskern.apps.analyze.analysis import Settings, analyze
from hesskern.apps.reproduce import published
from hesskern.text import number, percent


@pytest.fixture(scope="module")
def result():
    return analyze(
        Settings(model="f8x2", top=20, limit=150, epochs=3), command="hesskern analyze"
    ).result


@pytest.fixture(scope="module")
def html(result):
    return report.render(result)


@pytest.fixture(scope="module")
def beside_published(result):
    changed = copy.deepcopy(result)
    changed["published"] = published.figures_for("mnist", "f200x2")
    return changed


class Page(HTMLParser):
    """Collects text, pictures, and every address that a browser would fetch; checks nesting."""

    VOID = frozenset({"meta", "img", "br", "link", "hr"})

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.pictures, self.fetched = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.pictures.append(attributes)
        self.fetched += [attributes[key] for key in ("src", "href") if key in attributes]
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] != "style":
            self.texts.append(text)

    @property
    def text(self):
        return re.sub(r"[ \n]+", " ", "".join(self.texts))


def test_page_is_self_contained_and_its_pictures_are_svg(html):
    page = Page(html)
    links = [a for a in page.fetched if not a.startswith("data:image/svg+xml;base64,")]
    assert links == ["layers/fc1.html", "layers/fc2.html", "layers/fc3.html"]
    # overlap, rank one; eigenvalues and pairs per layer; two heat maps per layer
    assert len(page.pictures) == 2 + 3 + 3 + 6
    for picture in page.pictures:
        assert picture["alt"]
        svg = ET.fromstring(base64.b64decode(picture["src"].partition(",")[2]))
        assert svg.tag.endswith("svg")


def test_page_says_what_was_found_and_how_it_was_made(result, html):
    page = Page(html)
    for text in (
        "Curvature of F-8² on digits",
        "What was found",
        "hesskern analyze",
        "seed 0",
        "learning rate 0.01",
        result["versions"]["torch"],
        "accuracy",
        "top eigenpairs of fc2",
    ):
        assert text in page.text
    overlap = digest.Digest(result).marked("fc2", "overlap")
    assert percent(overlap) in page.text
    assert "Beside the published figures" not in page.text


def test_same_numbers_give_the_same_page(result, html):
    assert html == report.render(json.loads(json.dumps(result)))


def test_published_figures_stand_beside_ours(beside_published):
    page = Page(report.render(beside_published))
    assert "Beside the published figures" in page.text
    assert "1000 epochs of SGD" in page.text
    assert "The training differs" in page.text
    rows = {row["name"]: row for row in tables.published_overlaps(digest.Digest(beside_published))}
    assert rows["fc1"]["published"] == ["0.970", "0.940", "0.930", "0.860", "0.730"]
    ours = digest.Digest(beside_published)
    assert rows["fc2"]["ours"][1] == number(ours.at("fc2", "overlap", 9))
    assert rows["fc2"]["ours"][4] == "–"  # k = 49 of 20 eigenpairs
    (eigenvalues,) = tables.published_eigenvalues(ours)
    assert eigenvalues["name"] == "fc1"
    assert [row["minor"] for row in eigenvalues["rows"]] == [False, False, True] * 2
    labels = [row["label"] for row in tables.published_statistics(ours)]
    assert any("fc3, k = 1" in label for label in labels)
    assert not any("fc2, k = 400" in label for label in labels)  # longer than our curves


def test_one_model_alone_has_no_comparison_between_models(result):
    alone = copy.deepcopy(result)
    alone["models"], alone["pairs"] = alone["models"][:1], []
    page = Page(report.render(alone))
    assert "Do two models share" not in page.text
    assert "One model." in page.text
    assert image.imread(io.BytesIO(figures.Figures(alone).overview())).ndim == 3


def test_warnings_skipped_and_unconverged_layers_are_shown(result):
    changed = copy.deepcopy(result)
    changed["network"]["skipped"] = {"embed": "is an Embedding"}
    changed["warnings"] = ["something <odd> happened"]
    layer = changed["models"][1]["layers"]["fc1"]
    layer["converged"], layer["is_exact"], layer["inexact_reason"] = False, False, "Tanh follows"
    html = report.render(changed)
    text = Page(html).text
    assert "Layer embed was left out: it is an Embedding." in text
    assert (
        "Eigenpairs of fc1 (seed 1) did not all reach the tolerance: the worst residual is" in text
    )
    assert "not the whole Hessian: Tanh follows." in text
    assert "something &lt;odd&gt; happened" in html


def test_infinite_ratio_and_grouped_layers_do_not_break_the_page(result):
    changed = copy.deepcopy(result)
    changed["models"][0]["layers"]["fc2"]["autocorrelation"]["eigenvalue_ratio"] = None
    for model in changed["models"]:
        for key in ("autocorrelation", "correspondence", "factors"):
            del model["layers"]["fc1"][key]
    for pair in changed["pairs"]:
        pair["layers"]["fc1"]["prediction"] = None
    assert "∞" in Page(report.render(changed)).text


def test_overview_is_a_picture(beside_published):
    picture = image.imread(io.BytesIO(figures.Figures(beside_published).overview()))
    assert picture.shape[1] > 3 * picture.shape[0]


def test_all_files_are_written_and_nothing_else(result, tmp_path):
    paths = report.write_report(result, tmp_path / "a" / "b", {"more.bin": b"xyz"})
    assert paths[0] == tmp_path / "a" / "b" / "report.html"
    names = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert names == [
        "figures", "layers", "more.bin", "overview.png", "report.html", "result.json"
    ]  # fmt: skip
    assert json.loads((tmp_path / "a" / "b" / "result.json").read_text()) == result
    assert sorted(p.name for p in (tmp_path / "a" / "b" / "layers").iterdir()) == [
        "fc1.html", "fc2.html", "fc3.html"
    ]  # fmt: skip
    drawn = {path.name for path in (tmp_path / "a" / "b" / "figures").iterdir()}
    stems = {name.rpartition(".")[0] for name in drawn}
    assert drawn == {f"{stem}.{ending}" for stem in stems for ending in ("svg", "png")}
    # overlap, rank one; seven of every layer
    assert len(stems) == 2 + 7 * 3
    for path in (tmp_path / "a" / "b" / "figures").glob("*.png"):
        assert image.imread(path).ndim == 3


def test_every_layer_has_a_page_with_all_its_figures(result):
    for name in ("fc1", "fc2", "fc3"):
        page = Page(report.render_layer(result, name))
        assert len(page.pictures) == 7
        links = [address for address in page.fetched if not address.startswith("data:image/svg")]
        assert all(a == "../report.html" or re.fullmatch(r"fc[123]\.html", a) for a in links)
        assert f"{name}.html" not in links
        for text in ("F-8² on digits", "the exact Hessian", "worst residual", "seed 1"):
            assert text in page.text
        entry = result["models"][1]["layers"][name]
        assert number(entry["decoupling"]["frobenius"]) in page.text
        squares = [sum(v * v for v in row) for row in entry["singular_values"]]
        assert all(0 < total < 1 + 1e-5 for total in squares)
        assert [row[0] for row in entry["singular_values"]] == entry["rank_one"][:20]


def test_grouped_and_strangely_named_layers_have_pages(result):
    text = json.dumps(result).replace('"fc1"', '"a/b"').replace('"fc2"', '"a-b"')
    changed = json.loads(text)
    for model in changed["models"]:
        for key in ("autocorrelation", "correspondence", "factors"):
            del model["layers"]["a/b"][key]
        model["layers"]["a/b"]["inexact_reason"] = "Tanh follows"
    for pair in changed["pairs"]:
        pair["layers"]["a/b"]["prediction"] = None
    names = figures.file_names(changed["network"]["layers"])
    assert names == {"a/b": "a-b", "a-b": "a-b-1", "fc3": "fc3"}
    page = Page(report.render_layer(changed, "a/b"))
    assert len(page.pictures) == 4
    assert "the Gauss-Newton block, not the whole Hessian: Tanh follows" in page.text
    assert figures.file_names([""]) == {"": "layer"}
    # A name made to differ may itself be taken.
    crowded = figures.file_names(["a-b", "a-b-2", "a/b", "a.b", "a:b"])
    assert len(set(crowded.values())) == 5
    assert crowded["a.b"] == "a.b"


def test_interruption_while_writing_keeps_the_old_files_whole(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old")

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_files(tmp_path, {"report.html": b"new", "result.json": b"{}"})
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.94271, "0.943"),
        (0.99951, "1.00"),
        (12.288, "12.29"),
        (156.4, "156"),
        (15640.0, "15,640"),
        (3.2e-5, "3.20e-05"),
        (None, "–"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.943, "94 %"), (0.0561, "5.6 %"), (0.9996, "100.0 %"), (2e-5, "0.002 %")]
)
def test_percentages(share, text):
    assert percent(share) == text.replace(" ", "\u00a0")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("f200x2", "F-200²"),
        ("F600^4", "F-600⁴"),
        ("f600", "F-600"),
        ("f16x2-bn", "F-16² with batch norm"),
        ("lenet5-bn", "LeNet5 with batch norm"),
        ("nets:build", "nets:build"),
    ],
)
def test_network_names(spec, name):
    assert wording.network_name(spec) == name
