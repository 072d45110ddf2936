"""hesskern certify: the command, its files, its page."""

import json
import re
from dataclasses import replace

import pytest
import torch
from console import run

from hesskern.apps.certify import command as certify_command
from hesskern.apps.certify.published_nets import NETS, parse_net
from hesskern.pacbayes import load_certificate
from hesskern.pacbayes.truncated_method import Truncated
from hesskern.zoo import data

TINY = ["certify", "--net", "T-8_10", "--epochs", "2", "--passes", "3"]


def test_it_writes_a_page_and_a_certificate_that_holds(here):
    outcome = run(*TINY)
    assert outcome.exit_code == 0, outcome.output
    folder = here / "hesskern-certificate"
    names = ["certificate.html", "certificate.json", "seed0.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == names
    certificate = load_certificate(folder / "seed0.safetensors")
    net = parse_net("T-8_10")
    samples = certify_command._samples(net, data.load("digits"), 0)
    certificate.verify(samples)
    assert certificate.n == 1437
    assert certificate.test["n"] == 360
    assert f"T-8_10: error at most {certificate.bound:.4f}" in outcome.stdout
    page = (folder / "certificate.html").read_text()
    assert f"error at most {certificate.bound:.4f}" in page
    assert "hesskern certify --net T-8_10 --epochs 2 --passes 3" in page
    assert page.count("data:image/svg+xml") == 3
    assert "http" not in re.sub(r"data:image[^\"]*", "", page)


def test_a_certificate_is_checked_from_its_file(here):
    assert run(*TINY).exit_code == 0
    path = here / "hesskern-certificate/seed0.safetensors"
    outcome = run("certify", "--verify", path, "--passes", 2)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout.startswith(f"holds: {load_certificate(path)!r}")
    certificate = load_certificate(path)
    replace(certificate, bound=0.1).sealed().save(path)
    outcome = run("certify", "--verify", path, "--passes", 2)
    assert outcome.exit_code == 1
    assert "bound is 0.1, recomputed" in outcome.output


def test_a_held_out_prior_counts_only_what_it_has_not_seen(here):
    outcome = run(*TINY, "--held-out", 0.5, "--sgd-epochs", 2)
    assert outcome.exit_code == 0, outcome.output
    path = here / "hesskern-certificate/seed0.safetensors"
    certificate = load_certificate(path)
    assert certificate.n == 1437 - 718
    assert certificate.prior["samples seen"] == 718
    assert "718 samples that are not counted" in (path.parent / "certificate.html").read_text()
    assert run("certify", "--verify", path, "--passes", 2).exit_code == 0


def test_seeds_are_reported_as_a_mean(here):
    outcome = run(*TINY, "--seeds", 2, "--json")
    assert outcome.exit_code == 0, outcome.output
    result = json.loads(outcome.stdout)
    bounds = [c["bound"] for c in result["certificates"]]
    assert bounds[0] != bounds[1]
    assert result["bound"] == pytest.approx(sum(bounds) / 2)
    assert result["spread"] == pytest.approx(abs(bounds[0] - bounds[1]) / 2**0.5)
    assert result == json.loads((here / "hesskern-certificate/certificate.json").read_text())


def test_published_methods_run_from_the_command(here):
    outcome = run(*TINY, "--method", "iter", "--sgd-epochs", 1, "--whole-networks", "--json")
    assert outcome.exit_code == 0, outcome.output
    (certificate,) = json.loads(outcome.stdout)["certificates"]
    assert certificate["method"] == "iter"
    assert certificate["protocol"]["form"] == "langford-seeger"
    assert certificate["draws"] == 3


def test_ctrl_c_writes_the_certificate_of_the_current_state(here, monkeypatch):
    step, seen = Truncated.step, []

    def interrupted(self, rows, fraction):
        seen.append(1)
        if len(seen) > 3:
            raise KeyboardInterrupt
        return step(self, rows, fraction)

    monkeypatch.setattr(Truncated, "step", interrupted)
    outcome = run(*TINY)
    assert outcome.exit_code == 0, outcome.output
    assert ", interrupted" in outcome.stdout
    folder = here / "hesskern-certificate"
    assert load_certificate(folder / "seed0.safetensors").interrupted
    assert "was interrupted" in (folder / "certificate.html").read_text()


def test_wrong_input_ends_with_one_line(here):
    for arguments, match in (
        (["--net", "F-600"], "net must be like T-600"),
        (["--data", "mnist", "--root", "nowhere"], "found no file"),
        (["--epochs", 0], "epochs must be at least 1"),
        (["--learning-rate", -1], "rate_mean must be positive"),
    ):
        outcome = run(*TINY, *arguments)
        assert outcome.exit_code == 1
        assert match in outcome.output
        assert "Traceback" not in outcome.output
    assert not (here / "hesskern-certificate/certificate.html").exists()


def test_pixels_are_between_0_and_1_by_fixed_constants():
    digits = data.load("digits")
    net = parse_net("T-8_10")
    pixels = certify_command._samples(net, digits, 0).inputs
    # Sixteenths, as in the file: nothing of the training set's moments is left.
    torch.testing.assert_close(pixels * 16, (pixels * 16).round(), atol=1e-4, rtol=0)
    assert (float(pixels.min()), float(pixels.max())) == (0.0, 1.0)


@pytest.mark.parametrize("name", NETS)
def test_published_names_are_read_and_written(name):
    net = parse_net(name)
    assert net.name == name
    assert parse_net(name.replace("^", "x")) == net
    model = net.build((1, 2, 2), 0)
    widths = [m.out_features for m in model if isinstance(m, torch.nn.Linear)]
    assert widths == [net.width] * net.depth + [net.outputs]


def test_tasks():
    digits = torch.arange(10)
    assert parse_net("T-600").targets(digits, 0).tolist() == [0] * 5 + [1] * 5
    assert parse_net("T-600_10").targets(digits, 0).tolist() == list(range(10))
    many = torch.zeros(2000, dtype=torch.long)
    labels = parse_net("R-600").targets(many, 0)
    assert set(labels.tolist()) == {0, 1}
    assert abs(float(labels.float().mean()) - 0.5) < 0.05
    assert torch.equal(labels, parse_net("R-600").targets(many, 0))
    assert not torch.equal(labels, parse_net("R-600").targets(many, 1))
