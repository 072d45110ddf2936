"""What can go wrong after long work: seen before it, impossible, or nothing is lost by it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from certificates import FAST, NET, blobs
from console import run
from torch import Tensor, nn

import hesskern as hk
from hesskern import files
from hesskern.apps.certify import command as certify_command
from hesskern.apps.certify import report as certify_report
from hesskern.files import check_writable, drawn_or_kept, keep_if_possible, write_files
from hesskern.pacbayes import (
    CertifySettings,
    Protocol,
    PublishedSettings,
    certify,
    load_certificate,
    procedure,
)
from hesskern.pacbayes.certificate import CertificateError
from hesskern.pacbayes.description import describe, rebuild
from hesskern.pacbayes.published_methods import Published
from hesskern.pacbayes.samples import Samples
from hesskern.pacbayes.truncated_method import Truncated

TERMS = Protocol(passes=3)
NAN = torch.tensor(float("nan"))


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the work began")


def fails(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


# Folders and files.


def test_a_folder_that_takes_no_file_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"output .*file/a cannot be written: .*no writable"):
        check_writable(tmp_path / "file" / "a")
    with monkeypatch.context() as patch:
        patch.setattr(files.tempfile, "TemporaryFile", fails)
        with pytest.raises(ValueError, match=r"cannot be made: .*No space left"):
            check_writable(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"1\.0 MiB are free there, 16 are needed"):
        check_writable(tmp_path)


def test_files_that_find_no_place_are_put_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot be written .* what was computed is in ") as raised:
        write_files(tmp_path / "file", {"result.json": b"{}", "layers/a.html": b"<p>"})
    elsewhere = Path(str(raised.value).rpartition(" is in ")[2])
    try:
        assert (elsewhere / "result.json").read_bytes() == b"{}"
        assert (elsewhere / "layers" / "a.html").read_bytes() == b"<p>"
    finally:
        shutil.rmtree(elsewhere)


def test_where_nothing_can_be_written_both_reasons_are_told(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(files, "_write_files", fails)
    with pytest.raises(OSError, match=r"cannot be written .* neither can another folder"):
        write_files(tmp_path, {"result.json": b"{}"})


def test_numbers_are_kept_when_pages_fail(tmp_path: Path) -> None:
    def draw() -> dict[str, bytes]:
        raise KeyError("no such colour")

    with pytest.raises(
        files.NotDrawnError, match=r"no such colour.* numbers are in .*result\.json"
    ):
        drawn_or_kept(tmp_path, {"result.json": b"{}"}, draw)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    paths = drawn_or_kept(tmp_path, {"result.json": b"{}"}, lambda: {"page.html": b"<p>"})
    assert [p.name for p in paths] == ["page.html", "result.json"]


def test_a_file_that_only_saves_work_may_fail(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="could not be written, so this work is not kept"):
        assert not keep_if_possible(tmp_path / "file" / "a", lambda path: path.write_text("x"))
    assert keep_if_possible(tmp_path / "b" / "a", lambda path: path.write_text("x"))
    assert (tmp_path / "b" / "a").read_text() == "x"


def test_factors_that_share_memory_are_saved(tmp_path: Path) -> None:
    model, data = nn.Linear(3, 2), [(torch.randn(5, 3), torch.arange(5) % 2)]
    found = hk.kronecker_factors(model, data, nn.CrossEntropyLoss())
    layer = found[""]
    twice = {name: replace(layer, spec=replace(layer.spec, name=name)) for name in ("a", "b")}
    hk.Factors(twice, 5, {}, found.settings).save(tmp_path / "run.safetensors")
    loaded = hk.load_factors(tmp_path / "run.safetensors")
    for name in ("a", "b"):
        assert torch.equal(loaded[name].input_covariance, layer.input_covariance)
        assert torch.equal(loaded[name].output_hessian, layer.output_hessian)


# Certificates.


def certified(data: Samples | None = None, **options: Any) -> Any:
    model = NET.build((1, 3, 4), 3)
    options = {
        "epochs": 3,
        "protocol": TERMS,
        "settings": FAST,
        "checkpoint_every": 0,
        **options,
    }
    return certify(model, options.pop("prior", model), data or blobs(), **options)


@pytest.mark.parametrize(
    ("test", "match"),
    [
        (Samples(blobs(20).inputs.view(20, 12), blobs(20).targets), r"inputs must be .*1, 3, 4"),
        (Samples(blobs(20).inputs.double(), blobs(20).targets), "got .*float64"),
        (Samples(blobs(20).inputs, blobs(20).targets + 1), r"test: targets must lie in 0\.\.9"),
        (Samples(NAN * blobs(20).inputs, blobs(20).targets), "inputs must be finite"),
        ([], "data is empty"),
        (7, "must be an iterable"),
    ],
)
def test_bad_test_samples_are_seen_before_the_work(test: Any, match: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(procedure, "optimize", never)
    with pytest.raises((ValueError, TypeError), match=match):
        certified(test=test)


@pytest.mark.parametrize(
    ("change", "match"),
    [({"seed": 4}, "is not what its construction"), ({"classes": None}, "cannot be repeated")],
)
def test_a_wrong_record_of_the_prior_is_seen_before_the_work(
    change: dict[str, Any], match: str, monkeypatch: Any
) -> None:
    record = NET.prior_record((1, 3, 4), 3)
    assert certified(prior_record=record).prior["seed"] == 3
    monkeypatch.setattr(procedure, "optimize", never)
    with pytest.raises(CertificateError, match=match):
        certified(prior_record={**record, **change})


def test_a_checkpoint_without_a_folder_is_seen_before_the_work(
    tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(procedure, "optimize", never)
    with pytest.raises(ValueError, match=r"checkpoint: folder .* cannot be written"):
        certified(checkpoint=tmp_path / "file" / "state.pt")


def test_a_checkpoint_that_fails_later_ends_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "save", fails)
    with pytest.warns(RuntimeWarning, match=r"state\.pt could not be written"):
        found = certified(checkpoint=tmp_path / "state.pt")
    assert not found.interrupted
    assert list(tmp_path.iterdir()) == []


def diverging(kind: type[Any], at: int, how: Callable[[Any], Tensor | None]) -> Callable[..., Any]:
    """The method's step, of which the one with this number does not end well."""
    step, seen = kind.step, []

    def changed(self: Any, rows: Tensor, fraction: float) -> Tensor:
        seen.append(1)
        value = step(self, rows, fraction)
        if len(seen) == at:
            found = how(self)
            return value if found is None else found
        return value

    return changed


def spoiled(method: Any) -> None:
    """The last step of an epoch: no objective is computed from what it leaves."""
    parameters = (
        [layer.u for layer in method._layers.values()]
        if isinstance(method, Truncated)
        else list(method._means.values())
    )
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(float("nan"))


@pytest.mark.parametrize("method", ["truncated", "iter"])
@pytest.mark.parametrize(
    ("at", "how", "why"),
    [
        (8, lambda _: NAN, "objective is not finite in epoch 3, step 2"),
        (6, spoiled, "posterior is not finite after epoch 2"),
    ],
)
def test_an_optimization_that_diverges_late_is_certified_as_it_was(
    method: str, at: int, how: Any, why: str, tmp_path: Path, monkeypatch: Any
) -> None:
    kind = Truncated if method == "truncated" else Published
    monkeypatch.setattr(kind, "step", diverging(kind, at, how))
    options = {} if method == "truncated" else {"settings": PublishedSettings(batch_size=50)}
    path = tmp_path / "state.pt"
    with pytest.warns(RuntimeWarning, match=why + r".* after epoch \d, the last"):
        found = certified(method=method, checkpoint=path, epochs=5, **options)
    epochs = 2 if at == 8 else 1
    assert found.interrupted
    assert found.settings["epochs run"] == epochs == len(found.history)
    # It is the certificate of the run that ends there.
    kept = torch.load(path, weights_only=True)["state"]
    assert kept["epoch"] == epochs
    assert found.history == kept["history"]
    found.verify(blobs())


def test_a_resumed_optimization_falls_back_to_its_checkpoint(
    tmp_path: Path, monkeypatch: Any
) -> None:
    path = tmp_path / "state.pt"
    with monkeypatch.context() as patch:

        def killed(method: Any) -> None:
            raise SystemExit

        patch.setattr(Truncated, "step", diverging(Truncated, 5, killed))
        with pytest.raises(SystemExit):
            certified(checkpoint=path, epochs=5)
    monkeypatch.setattr(Truncated, "step", diverging(Truncated, 1, lambda _: NAN))
    with pytest.warns(RuntimeWarning, match="the posterior after epoch 1"):
        found = certified(checkpoint=path, epochs=5)
    assert found.settings["epochs run"] == 1
    found.verify(blobs())


def test_an_optimization_that_diverges_at_once_has_nothing_to_certify(monkeypatch: Any) -> None:
    monkeypatch.setattr(Truncated, "step", diverging(Truncated, 3, spoiled))
    with pytest.raises(ValueError, match="the posterior is not finite after epoch 1"):
        certified()


def test_variances_that_vanish_in_float32_are_positive(monkeypatch: Any) -> None:
    """exp(-120) is zero in float32, and log s is part of KL."""

    def shrunk(method: Any) -> None:
        with torch.no_grad():
            for log in method._log_variances.values():
                log[0, 0] = -120.0
                log[0, 1] = -700.0

    monkeypatch.setattr(Published, "step", diverging(Published, 9, shrunk))
    found = certified(method="base", epochs=3, settings=PublishedSettings(batch_size=50))
    smallest = [float(layer.variance.min()) for layer in found.layers.values()]
    assert all(0 < s < 1e-300 for s in smallest)
    found.verify(blobs())


def test_error_and_divergence_have_weights_where_the_bound_is_one() -> None:
    """With KL / n above 36, kl^-1 is 1 to the last digit and has no slope."""
    model, samples = NET.build((1, 3, 4), 3), blobs()
    far = {name: tensor + 40 for name, tensor in model.state_dict().items()}
    settings = replace(FAST, warm_up=0.0)
    found = certify(model, far, samples, epochs=2, protocol=TERMS, settings=settings, start="model")
    assert found.kl > 36 * found.n
    assert found.bound == 1


def test_a_start_that_diverges_is_told(monkeypatch: Any) -> None:
    samples = blobs()
    with pytest.raises(ValueError, match="the start's training diverged in epoch 1"):
        procedure.train_start(NET.build((1, 3, 4), 3), samples, 3, 0, lambda *_: None, rate=1e30)


def test_pooling_is_described_as_it_is() -> None:
    """A network that is built again from its description must be the one that was certified."""
    pools = nn.Sequential(
        nn.MaxPool2d(2, 2, 1, dilation=2, ceil_mode=True),
        nn.AvgPool2d(2, 2, 1, ceil_mode=True, count_include_pad=False, divisor_override=3),
    )
    x = torch.randn(2, 1, 11, 13, generator=torch.Generator().manual_seed(0))
    description = json.loads(json.dumps(describe(pools)))
    assert torch.equal(rebuild(description)(x), pools(x))


TINY = ["certify", "--net", "T-8_10", "--epochs", "2", "--passes", "2"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--minutes", "1"], "give either epochs or minutes"),
        (["--learning-rate", "-1"], "rate_mean must be positive"),
        (["--learning-rate", "inf"], "rate_mean must be positive and finite"),
        (["--method", "iter", "--learning-rate", "nan"], "rate must be positive and finite"),
    ],
)
def test_options_are_read_before_the_start_is_trained(
    options: list[str], match: str, here: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(certify_command, "train_start", never)
    outcome = run(*TINY, "--held-out", "0.5", *options)
    assert outcome.exit_code == 1
    assert match in outcome.output


def test_certificates_of_finished_seeds_stay(here: Path, monkeypatch: Any) -> None:
    done = certify_command.certify_with

    def second_fails(settings: CertifySettings, *arguments: Any, **options: Any) -> Any:
        if settings.seed == 1:
            raise ValueError("the objective is not finite")
        return done(settings, *arguments, **options)

    monkeypatch.setattr(certify_command, "certify_with", second_fails)
    outcome = run(*TINY, "--seeds", "2")
    assert outcome.exit_code == 1
    text = " ".join(outcome.output.split())
    assert "seed 1: the objective is not finite; the certificates of the seeds before it" in text
    load_certificate(here / "hesskern-certificate/seed0.safetensors").verify()


def test_a_page_that_cannot_be_drawn_costs_no_certificate(here: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(certify_report, "render", fails)
    outcome = run(*TINY)
    assert outcome.exit_code == 1
    assert "the numbers are in" in outcome.output
    folder = here / "hesskern-certificate"
    load_certificate(folder / "seed0.safetensors").verify()
    assert json.loads((folder / "certificate.json").read_text())["net"] == "T-8_10"


@pytest.mark.skipif(os.name == "nt", reason="folders are replaced in another way on Windows")
def test_a_folder_that_went_away_costs_no_certificate(here: Path, monkeypatch: Any) -> None:
    done = certify_command.certify_with

    def folder_goes(*arguments: Any, **options: Any) -> Any:
        found = done(*arguments, **options)
        shutil.rmtree(here / "hesskern-certificate", ignore_errors=True)
        (here / "hesskern-certificate").write_text("in the way")
        return found

    monkeypatch.setattr(certify_command, "certify_with", folder_goes)
    outcome = run(*TINY)
    assert outcome.exit_code == 1
    said = " ".join(outcome.output.split())
    elsewhere = Path(said.rpartition("what was computed is in ")[2].split()[0])
    try:
        load_certificate(elsewhere / "seed0.safetensors").verify()
    finally:
        shutil.rmtree(elsewhere)
