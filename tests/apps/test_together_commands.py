"""influence, reproduce and certify in two processes: what one process finds, said and kept once."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from alike import differences
from typed import Typed, typed

import hesskern as hk
from hesskern.files import write_files
from hesskern.pacbayes import load_certificate

REPRODUCE = (
    "reproduce autocorrelation overlap-f200x2 --data digits --model f8x2 --limit 101 --epochs 1 "
    "--seeds 2 --top 5"
).split()
INFLUENCE = "influence --model f8x2 --limit 101 --epochs 1 --queries 3".split()


def both(arguments: list[str], folder: Path, **options: Any) -> tuple[Typed, Typed, Typed]:
    """Of one process, of the first of two, of the second."""
    (alone,) = typed([*arguments, "--output", "one"], folder, ranks=1, **options)
    first, second = typed([*arguments, "--output", "two"], folder, **options)
    assert (alone.code, first.code, second.code) == (0, 0, 0), first.err
    assert (second.out, second.err) == ("", "")
    assert first.out.replace("two/", "one/") == alone.out
    return alone, first, second


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def unwritten(_: Any, study: Any, folder: Path, others: Any) -> list[Path]:
    """A report without its page."""
    scores = {"scores.safetensors": study.scores.packed()}
    return write_files(
        folder, {**scores, "influence.json": json.dumps(study.result).encode(), **others}
    )


def test_influence(tmp_path: Path) -> None:
    both(INFLUENCE, tmp_path, replaced={"hesskern.apps.influence.command:write_report": unwritten})
    assert files(tmp_path / "two") == files(tmp_path / "one") != set()
    one, two = (
        hk.load_influence(tmp_path / k / "scores.safetensors").scores for k in ("one", "two")
    )
    assert one.shape == (3, 101)
    # Targets drawn by the samples' numbers; eigenvectors in float32.
    assert (one - two).norm() < 1e-3 * one.norm()
    found = [json.loads((tmp_path / k / "influence.json").read_text()) for k in ("one", "two")]
    indices = [[query["index"] for query in result["queries"]] for result in found]
    assert indices[0] == indices[1]


def test_reproduce_from_nothing_and_from_what_it_has_kept(tmp_path: Path) -> None:
    both(REPRODUCE, tmp_path)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    name = "overlap-f200x2/result.json"
    (one,), (two,) = (list((tmp_path / k).rglob(name)) for k in ("one", "two"))
    results = [json.loads(path.read_text()) for path in (one, two)]
    assert differences(*results, but="seconds command versions created", close=2e-3) == []
    # Both find what the first has kept; nothing is trained again.
    again = typed([*REPRODUCE, "--output", "two"], tmp_path, replaced={KEPT: computed_again})
    assert [one.code for one in again] == [0, 0], again[0].err


KEPT = "hesskern.apps.reproduce.lab:kronecker_factors"


def computed_again(*_: Any, **__: Any) -> Any:
    raise AssertionError("these factors are kept")


CERTIFY = "certify --net T-16_10 --epochs 2 --passes 3".split()


def test_certify_and_verify(tmp_path: Path) -> None:
    drawn = {"hesskern.apps.certify.report:write": unpaged}
    (alone,) = typed([*CERTIFY, "--output", "one"], tmp_path, ranks=1, replaced=drawn)
    first, second = typed([*CERTIFY, "--output", "two"], tmp_path, replaced=drawn)
    assert (alone.code, first.code, second.code) == (0, 0, 0), first.err
    assert first.out.replace("two/", "one/") == alone.out
    assert (second.out, second.err) == ("", "")
    # No checkpoint of either process is left.
    assert files(tmp_path / "two") == files(tmp_path / "one") == {"seed0.safetensors"}
    one, two = (load_certificate(tmp_path / k / "seed0.safetensors") for k in ("one", "two"))
    assert (two.bound, two.kl, two.errors, two.test) == (one.bound, one.kl, one.errors, one.test)
    again = typed(["certify", "--verify", "two/seed0.safetensors", "--passes", 3], tmp_path)
    assert [process.code for process in again] == [0, 0], again[0].err
    assert again[0].out.startswith("holds: ")
    assert again[1].out == ""


def unpaged(_: Any, result: Any, certificates: Any, folder: Path) -> list[Path]:
    return [folder / "certificate.html"]


def both_at_once(original: Any, *arguments: Any, **options: Any) -> Any:
    """Ctrl-C, of which every process hears during the optimization."""
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("not interrupted")


def test_ctrl_c_ends_a_certificate_of_several_processes(tmp_path: Path) -> None:
    replaced = {"hesskern.pacbayes.loop:_shown": both_at_once}
    found = typed([*CERTIFY, "--output", "two"], tmp_path, replaced=replaced)
    assert [one.code for one in found] == [130, 130], found[0].err
    assert found[0].err.splitlines()[-1] == "Interrupted; no file was left half-written."
    assert found[1].err == ""


def breaks_on_the_second(original: Any, *arguments: Any, **options: Any) -> Any:
    if os.environ["RANK"] == "1":
        raise KeyError("fc7")
    return original(*arguments, **options)


@pytest.mark.parametrize("items", [["autocorrelation"], ["autocorrelation", "overlap-f200x2"]])
def test_an_item_that_one_process_cannot_do_ends_all(items: list[str], tmp_path: Path) -> None:
    words = ["reproduce", *items, *REPRODUCE[3:]]
    replaced = {"hesskern.apps.reproduce.factors:input_autocorrelation": breaks_on_the_second}
    first, second = typed(words, tmp_path, replaced=replaced)
    assert (first.code, second.code) == (1, 1)
    assert "rank 1 of 2 failed in autocorrelation: KeyError: 'fc7'" in first.err
    assert not list(tmp_path.rglob("autocorrelation/result.json"))
