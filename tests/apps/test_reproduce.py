"""``hesskern reproduce``: the command, its budget, files and page."""

import copy
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch
from tiny_lab import F200, FOLDER, SHOWN, SMALL, TINY, run

from hesskern.apps.reproduce import between, catalogue, command, published
from hesskern.apps.reproduce.lab import Lab
from hesskern.apps.reproduce.report import render, verdict_words, write_item, write_page
from hesskern.apps.reproduce.results import Chart, Curve, Outcome, judge
from hesskern.zoo import models


def test_items_write_their_numbers_and_figures(everything):
    folder, outcome = everything
    results = json.loads(outcome.stdout)
    assert [result["item"] for result in results] == [n for n in catalogue.ITEMS if n in SHOWN]
    page = (folder / FOLDER / "report.html").read_text()
    for result in results:
        path = folder / FOLDER / result["item"]
        assert json.loads((path / "result.json").read_text()) == result
        assert result["format"] == "hesskern.reproduce/1"
        assert result["command"].startswith("hesskern reproduce --output")
        assert f'id="{result["item"]}"' in page
        figures = [*result["charts"], *result["heat_maps"]]
        assert figures or result["tables"]
        for figure in figures:
            assert ET.parse(path / f"{figure['name']}.svg").getroot().tag.endswith("svg")
            assert (path / f"{figure['name']}.png").read_bytes().startswith(b"\x89PNG")
        assert all(verdict["agrees"] is None for verdict in result["verdicts"])
        assert "here: F-16" in result["title"] or not result["networks"]
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert "No figure here is judged" in page
    assert outcome.stderr.count("no verdict") == sum(len(r["verdicts"]) for r in results)


def results_of(everything):
    return json.loads(everything[1].stdout)


def test_the_contents_name_items_without_what_was_changed(everything):
    page = (everything[0] / FOLDER / "report.html").read_text()
    contents = re.search(r"<nav.*?</nav>", page, re.DOTALL).group()
    titles = re.findall(r'<a href="#[^"]+">([^<]+)</a>', contents)
    assert titles == [
        i.title.replace("'", "&#39;") for n, i in catalogue.ITEMS.items() if n in SHOWN
    ]
    assert "(data digits, model f16x2, the first 200 samples, 2 epochs)" in page


def test_captions_speak_of_crosses_only_where_figures_are_published(everything):
    folder = everything[0] / FOLDER
    results = results_of(everything)
    assert "crosses" not in render(folder, results)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", render(folder, results))
    assert "Squares: the darker, the larger." in captions
    with_points = copy.deepcopy(results)
    curve = next(r for r in with_points if r["item"] == "overlap-f200x2")["charts"][0]["curves"][0]
    curve |= {"published": True, "style": "points"}
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", render(folder, with_points))
    assert sum("crosses: published" in caption for caption in captions) == 1


def test_a_missing_figure_costs_the_page_that_figure_alone(everything, tmp_path):
    folder = shutil.copytree(everything[0] / FOLDER, tmp_path / "copy")
    whole = (folder / "report.html").read_text()
    charts = next(r for r in results_of(everything) if r["item"] == "overlap-f200x2")["charts"]
    name = f"{charts[0]['name']}.svg"
    (folder / "overlap-f200x2" / name).unlink()
    page = write_page(folder, SHOWN).read_text()
    assert page.count("<img") == whole.count("<img") - 1
    assert page.count("<section>") == len(SHOWN)
    assert re.search(rf"missing, as <code>{re.escape(name)}</code> cannot be read", page)


def test_numbers_that_json_does_not_hold_are_dashes(everything):
    results = copy.deepcopy(results_of(everything))
    result = next(r for r in results if r["verdicts"] and r["networks"])
    verdict = result["verdicts"][0]
    verdict |= {"ours": None, "low": 0.25, "high": None, "count": 2}
    result["networks"][0]["train_loss"] = None
    page = render(everything[0] / FOLDER, results)
    row = next(r for r in page.split("<tr") if f"<td>{verdict['what']}</td>" in r)
    assert '<td>–</td><td class="verdict">' in row
    assert "<td>0.250 to –</td>" in row
    assert "right on them, loss –" in page
    assert "ours – [0.250, –] of 2" in verdict_words(verdict)


def test_infinite_numbers_are_written_and_shown(tmp_path):
    outcome = Outcome(
        charts=[
            Chart("c", "C", "k", "y", [Curve("a", [[math.inf, 1.0], [2.0, math.nan]])], log=True)
        ],
        verdicts=[judge("ratio", [math.inf, 3.0])],
    )
    facts = {"changed": "", "networks": [], "command": "x", "created": "2026-01-01", "seconds": 1.0}
    facts |= {"profile": "quick", "versions": {"device": "cpu", "threads": 1}}
    write_item(tmp_path, catalogue.ITEMS["random-data"], outcome, facts)
    page = write_page(tmp_path, ["random-data"]).read_text()
    assert "<td>–</td><td>–</td>" in page
    assert "<td>3.000 to –</td>" in page


def test_verdicts():
    near = judge("a", [0.90, 0.94], 0.94, within=0.03)
    assert (near.agrees, near.ours, near.low, near.high) == (True, pytest.approx(0.92), 0.90, 0.94)
    assert judge("a", [0.90], 0.94, within=0.03).agrees is False
    assert judge("a", [0.91], 0.94, within=0.03).agrees is True
    assert judge("a", [0.5], "x", between=(0.5, 0.6)).agrees is True
    assert judge("a", [0.61], "x", between=(0.5, 0.6)).agrees is False
    held = judge("a", [0.90], 0.94, within=0.03, withheld="other data")
    assert (held.agrees, held.note) == (None, "other data")
    with pytest.raises(ValueError, match="ours must hold at least one value"):
        judge("a", [])
    with pytest.raises(ValueError, match="within needs a published number"):
        judge("a", [1.0], "dark", within=0.1)
    words = verdict_words(vars(near))
    assert words == "a: published 0.94, ours 0.920 [0.900, 0.940] of 2: agrees (within 0.03)"
    far = vars(judge("a", [0.1], 0.94, within=0.03))
    assert verdict_words(far) == "a: published 0.94, ours 0.100: DIFFERS (within 0.03)"


def test_budget_leaves_out_what_does_not_fit(tmp_path):
    names = ["overlap-f200x2", "autocorrelation"]
    assert command.parse_budget("1h30m") == 5400
    assert command.parse_budget("45M") == 2700
    assert command.parse_budget("1.5m10s") == 100
    for bad in ("", "2", "h", "0s", "2 days"):
        with pytest.raises(ValueError, match="budget must be a time such as 2h"):
            command.parse_budget(bad)
    minutes = catalogue.ITEMS["overlap-f200x2"].minutes["quick"] + 1
    outcome = run(*names, *SMALL, "--output", tmp_path, "--budget", f"{minutes}m", "--json")
    assert outcome.exit_code == 0, outcome.output
    done, left_out = json.loads(outcome.stdout)
    assert [done["item"], left_out["item"]] == names
    assert left_out["left_out"].startswith("expected 5 min, ")
    assert "Left out: autocorrelation (expected" in outcome.stderr


def test_list_and_wrong_arguments(tmp_path):
    listing = run("--list").output
    assert all(name in listing for name in catalogue.ITEMS)
    for arguments, message in (
        ([], "name at least one item, or all"),
        (["figure-9"], "there is no item 'figure-9'; there are overlap-f200x2,"),
        (["rank-one", "--budget", "soon"], "budget must be a time"),
        (["rank-one", "--data", "digits", "--model", "lenet5", "--output", tmp_path], "lenet5"),
    ):
        outcome = run(*arguments)
        assert outcome.exit_code == 1
        assert message in outcome.stderr


def test_every_item_has_networks_that_can_be_built():
    shapes = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
    for item in catalogue.ITEMS.values():
        for net in item.networks:
            with torch.device("meta"):
                models.build(net.model, shapes[net.data], 10)
    assert [i.name for i in command._chosen(("all",))] == list(catalogue.ITEMS)
    chosen = command._chosen(("rank-one", "overlap-f200x2"))
    assert [i.name for i in chosen] == ["overlap-f200x2", "rank-one"]


def test_published_figures_are_complete():
    for network_, layers in published.BETWEEN.items():
        assert all(0 < value < 1 and k >= 1 for k, value in layers.values()), network_
    for item in catalogue.ITEMS.values():
        assert set(item.minutes) == {"quick", "paper"}
        assert item.shows.endswith(".")


def test_an_item_that_cannot_be_done_leaves_the_others(tmp_path):
    names = ["models-lenet5", "autocorrelation", "clusters"]
    outcome = run(*names, *SMALL[:-1], 1, "--output", tmp_path, "--json")
    assert outcome.exit_code == 1
    found = json.loads(outcome.stdout)
    assert [entry["item"] for entry in found] == ["autocorrelation", "clusters", "models-lenet5"]
    assert found[-1]["left_out"] == "seeds must be at least 2 to compare models, got 1"
    assert "Left out: models-lenet5 (seeds must" in outcome.stderr
    # No verdicts: the table itself is printed.
    assert "by logit and class" in outcome.stderr
    with pytest.raises(ValueError, match="at least 2 to compare models"):
        between.width_variants(Lab(tmp_path, overrides=replace(TINY, seeds=1)), [F200])
