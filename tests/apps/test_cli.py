"""The command line: options, output, errors, interruption."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from console import run

import hesskern
from hesskern.apps import cli, commands

TINY = ["analyze", "--model", "f8x1", "--limit", "120", "--epochs", "2", "--top", "10"]


def test_analyze_writes_report_result_picture_and_weights(here):
    outcome = run(*TINY)
    assert outcome.exit_code == 0, outcome.output
    folder = here / "hesskern-report"
    names = ["figures", "layers", "overview.png", "report.html", "result.json"]
    names += ["seed0.safetensors", "seed1.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "layers" / "fc2.html").is_file()
    assert "figures: as SVG and PNG" in outcome.stdout
    result = json.loads((folder / "result.json").read_text())
    words = "hesskern analyze --model f8x1 --top 10 --epochs 2 --limit 120"
    assert result["command"] == words
    assert words in (folder / "report.html").read_text()
    assert "Curvature of F-8 on digits" in outcome.stdout
    assert "fc2" in outcome.stdout
    assert "report.html" in outcome.stdout
    assert "seed 0: training" in outcome.stderr


def test_json_goes_to_stdout_and_all_else_to_stderr(here):
    outcome = run(*TINY, "--seeds", 1, "--json", "--output", "out")
    assert outcome.exit_code == 0, outcome.output
    result = json.loads(outcome.stdout)
    assert result == json.loads((here / "out" / "result.json").read_text())
    assert "Curvature of F-8 on digits" in outcome.stderr


def test_options_reach_the_analysis(here):
    options = ["--seed", 5, "--seeds", 1, "--dtype", "float64", "--layers", "fc2, fc1", "--json"]
    outcome = run(*TINY, *options)
    assert outcome.exit_code == 0, outcome.output
    result = json.loads(outcome.stdout)
    assert [model["label"] for model in result["models"]] == ["seed 5"]
    assert result["settings"]["dtype"] == "float64"
    assert sorted(result["network"]["layers"]) == ["fc1", "fc2"]
    assert result["models"][0]["training"]["recipe"]["epochs"] == 2


def test_checkpoints_are_loaded_instead_of_trained(here):
    assert run(*TINY, "--output", "first").exit_code == 0
    weights = [here / "first" / f"seed{seed}.safetensors" for seed in (0, 1)]
    checkpoints = [word for path in weights for word in ("--checkpoint", path)]
    outcome = run(*TINY, *checkpoints, "--output", "second", "--json")
    assert outcome.exit_code == 0, outcome.output
    first = json.loads((here / "first" / "result.json").read_text())
    second = json.loads(outcome.stdout)
    assert [model["label"] for model in second["models"]] == ["seed0", "seed1"]
    assert all(model["training"] is None for model in second["models"])
    assert second["pairs"] == first["pairs"]
    for before, after in zip(first["models"], second["models"], strict=True):
        assert before["layers"] == after["layers"]
    assert not (here / "second" / "seed0.safetensors").exists()


def test_own_model_from_the_current_folder(here):
    (here / "folder_net.py").write_text(
        "from torch import nn\n"
        "def net(inputs, classes):\n    return nn.Sequential(nn.Linear(inputs, classes))\n"
    )
    try:
        outcome = run(*TINY, "--model", "folder_net:net", "--seeds", 1, "--json")
    finally:
        sys.modules.pop("folder_net", None)
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["network"]["layers"] == ["0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "vgg99"], "Error: model must be one of"),
        (["--layers", "fc7"], "fc7"),
        (["--checkpoint", "nothing.pt"], "Error: checkpoint nothing.pt does not exist"),
        (["--top", "0"], "Error: top must be at least 1, got 0"),
        (["--data", "mnist", "--root", "nowhere"], "MNIST: found no file"),
        (["--device", "warp"], "Error: device 'warp' cannot be used here"),
        (["--limit", "0"], "Error: limit must be at least 1, got 0"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_files(here, options, message):
    outcome = run(*TINY, *options)
    assert outcome.exit_code == 1
    assert message in outcome.stderr
    assert "Traceback" not in outcome.output
    assert list(here.iterdir()) == []


def test_output_that_cannot_be_written_is_refused_before_the_work(here, monkeypatch):
    (here / "file").write_text("in the way")

    def never(*_):
        raise AssertionError("the work began")

    monkeypatch.setattr(commands, "analyze", never)
    outcome = run(*TINY, "--output", here / "file" / "below")
    assert outcome.exit_code == 1
    assert "cannot be written" in outcome.stderr


def test_unknown_options_and_data_are_usage_errors(here):
    assert run("analyze", "--data", "svhn").exit_code == 2
    assert run("analyse").exit_code == 2


def test_interruption_exits_130_with_one_line(here, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "analyze", interrupted)
    outcome = run(*TINY)
    assert outcome.exit_code == 130
    assert outcome.stderr == "Interrupted; no file was left half-written.\n"
    assert list(here.iterdir()) == []


SLOW_NET = """
import os, signal, sys, weakref
from torch import nn

class Held:
    pass

def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)

def net(inputs, classes):
    {}
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, classes))
"""

# Where Ctrl-C comes while the model is made, besides from outside.
INTERRUPTED = {
    "from outside": "print('built', file=sys.stderr, flush=True)",
    "in the open": "interrupt()",
    "in exec, which changes CPython's exit code": "exec('interrupt()')",
    "in a weak reference's callback": "held = Held(); r = weakref.ref(held, interrupt); del held",
    "where everything is caught": """try: interrupt(); [0 for _ in range(1000)]
    except BaseException: pass""",
}


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C reaches processes in another way on Windows")
@pytest.mark.parametrize("where", INTERRUPTED)
def test_sigint_in_the_middle_of_an_analysis(here, where):
    (here / "slow_net.py").write_text(SLOW_NET.format(INTERRUPTED[where]))
    command = [sys.executable, "-m", "hesskern", "analyze", "--model", "slow_net:net"]
    root = str(Path(hesskern.__file__).resolve().parents[1])
    process = subprocess.Popen(
        [*command, "--epochs", "100000"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
        # Whoever runs the tests in the background may have it ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stderr is not None
        if where == "from outside":
            # A torch with CUDA says before it that there is no GPU.
            assert "built\n" in iter(process.stderr.readline, "")
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.rstrip().splitlines()[-1] == "Interrupted; no file was left half-written."
    assert "Traceback" not in errors
    assert not (here / "hesskern-report").exists()


def test_info_shows_the_build():
    outcome = run("info")
    assert outcome.exit_code == 0
    assert torch.__version__ in outcome.stdout
    facts = json.loads(run("info", "--json").stdout)
    assert facts["built: simd"] == hesskern.build_info()["simd"]
    assert facts["threads"] == torch.get_num_threads()


def test_help_and_version():
    assert "--checkpoint" in run("analyze", "--help").stdout
    assert hesskern.__version__ in run("--version").stdout


def test_missing_packages_are_named_with_what_to_install(monkeypatch):
    found = importlib.util.find_spec

    def without(name, *rest):
        return None if name in ("jinja2", "sklearn") else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert "needs jinja2, scikit-learn" in str(stopped.value)
    assert 'pip install "hesskern[cli]"' in str(stopped.value)


def test_published_figures_are_given_to_the_analysis_of_their_network(here, monkeypatch):
    given = []

    def seen(*arguments):
        given.append(arguments[4])
        raise ValueError("seen")

    monkeypatch.setattr("hesskern.apps.commands.analyze", seen)
    for arguments in (["--data", "mnist"], ["--data", "mnist", "--model", "f9x2"], []):
        assert run("analyze", *arguments).exit_code == 1
    assert given[0]["network"] == "F-200² on MNIST"
    assert given[1:] == [None, None]
