"""Plans: what a pass will take in memory, operations and time, before it is made."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hesskern.choices import Bias, Output, Precision, check_choice
from hesskern.operators.samples import joined_bytes
from hesskern.operators.spilled import read_ahead_bytes
from hesskern.passes.batches import Batch, sample_count
from hesskern.passes.input_batches import inputs_alone
from hesskern.passes.layers import select_layers
from hesskern.passes.losses import resolve_loss
from hesskern.passes.masks import checked_mask
from hesskern.passes.memory import budget_for, check_budget, free_bytes
from hesskern.passes.roots import check_output
from hesskern.planning.few_rows import enough_rows, held_beyond, with_few_rows
from hesskern.planning.layers import (
    BatchRows,
    batch_rows,
    held_by,
    model_bytes,
    total,
    workspace_of,
)
from hesskern.planning.requests import Request, What
from hesskern.planning.result import LayerPlan, Plan, size
from hesskern.planning.shape_run import ROWS, SAMPLES, ShapeRun
from hesskern.planning.shaped import (
    ShapedBatches,
    batches_of,
    has_values,
    planned_device,
    repeated,
    shaped_model,
)
from hesskern.planning.spilled_samples import batches_until_spilling, held_while_spilling
from hesskern.planning.timing import timed
from hesskern.spill.rooms import Spill, on_paper

__all__ = ["plan"]

# Batches that are run on shapes: from the third on, every batch takes the same.
_BATCHES = 3
# Calls of these are one for every part that the root rows of a batch come in, for every use.
_TAKEN = ("output_hessian_", "eigen_correction_", "conv_eigen_correction_")
# From so many root rows per sample on, drawn targets are worth a word.
_MANY_ROWS = 1000


def plan(
    model: nn.Module,
    example_inputs: Any,
    loss: Any = None,
    layers: str | Iterable[str] | None = None,
    what: What = "factors",
    *,
    output: Output | None = None,
    batch_size: int | None = None,
    num_samples: int | None = None,
    bias: Bias = "none",
    mc_samples: int = 1,
    output_root: Callable[..., Tensor] | None = None,
    memory_budget: int | None = None,
    check: bool = True,
    max_outputs: int = 8192,
    position_mask: Callable[[Any], Any] | None = None,
    diagonal: bool = False,
    precision: Precision = "float32",
    spill: Spill | None = None,
    available: int | None = None,
    timing: bool = True,
) -> Plan:
    """What a pass over data will take, before it is made: memory, operations, time.

    The function itself is run on shapes: its tensors have no values and take no memory, and what
    it would hold is counted, kernels' workspaces on the host included. So the plan is that of the
    code that will run, with its chunks, its budgets and its copies. Batches are taken to be loaded
    one after the other, and count while somebody holds them.

    Args:
        model: any module that can be deep-copied; it is not run, but for the time. It may be on the
            meta device, and is then planned for the host.
        example_inputs: one batch as the data yield it: (inputs, targets) or what the loss takes
            apart; for ``what="inputs"`` inputs alone will do. One sample is enough where
            ``batch_size`` is given. Tensors may be on the meta device.
        loss, layers, bias, mc_samples, output_root, memory_budget, check, max_outputs,
            position_mask, diagonal, precision, spill: as in the function that is planned; those
            that it lacks are not used, but for ``spill``.
        what: "factors" (:func:`hesskern.kronecker_factors`), "ekfac" (:func:`hesskern.ekfac`),
            "hessians" (:func:`hesskern.layer_hessians`) or "inputs"
            (:func:`hesskern.input_covariances`).
        output: as in the function, whose default None is.
        batch_size: samples of a batch; None for that of the example.
        num_samples: of all of the data; None for one batch.
        available: bytes that may be used; None for what is free.
        timing: whether two batches are really passed for the time. They are not where values are
            missing, or where the peak does not fit.

    Returns:
        :class:`Plan`, which prints as a table.

    Raises:
        ValueError, TypeError, NotImplementedError: bad arguments, as in the function.
    """
    check_choice("what", what, What)
    if output is None:
        output = "mc" if what == "ekfac" else "exact"
    check_output(output, mc_samples, 0)
    checked_mask(position_mask)
    for name, value in (("batch_size", batch_size), ("num_samples", num_samples)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an int or None, got {type(value).__name__}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if spill is not None and what not in ("factors", "hessians"):
        raise ValueError(f"spill must be None for what={what!r}, which keeps all on its device")
    if available is not None:
        available = check_budget(available)
    request = Request(
        what,
        loss,
        layers if layers is None or isinstance(layers, str) else tuple(layers),
        output,
        bias,
        mc_samples,
        output_root,
        memory_budget,
        check,
        max_outputs,
        position_mask,
        diagonal,
        precision,
        spill,
    )
    given = _samples(request, model, example_inputs)
    size_of_batch = batch_size or given
    samples = num_samples or size_of_batch
    example = _Example(model, example_inputs, given)
    found = _run(request, example, size_of_batch, samples)
    room = free_bytes(planned_device(model)) if available is None else available
    fits = room is None or found.peak <= room
    times: Mapping[str, float] = {}
    if timing and fits and has_values(model, example_inputs):
        batch = repeated(example_inputs, given, size_of_batch)
        times = timed(request, model, batch, samples / size_of_batch)
    return Plan(
        what,
        output,
        size_of_batch,
        samples,
        batches_of(samples, size_of_batch),
        str(planned_device(model)),
        found.rows.count,
        found.blocks,
        found.layers,
        found.skipped,
        found.peak,
        found.at_peak,
        found.kept,
        model_bytes(model),
        memory_budget,
        room,
        fits,
        found.operations,
        times,
        tuple(_advice(request, example, size_of_batch, samples, found, room)),
        spill,
        found.elsewhere,
        found.read_ahead,
    )


@dataclass(frozen=True)
class _Example:
    """What is planned for: a model, a batch as the data yield it, and its number of samples."""

    model: nn.Module
    element: Any
    samples: int


@dataclass(frozen=True)
class _Found:
    """What a run on shapes has found; names as those of :class:`Plan`."""

    layers: tuple[LayerPlan, ...]
    skipped: Mapping[str, str]
    rows: BatchRows
    blocks: int
    peak: int
    at_peak: Mapping[str, int]
    kept: int
    operations: Mapping[str, int]
    elsewhere: int
    read_ahead: int


def _samples(request: Request, model: nn.Module, element: Any) -> int:
    """Number of samples in an element of the data."""
    if request.what == "inputs":
        parts = inputs_alone(model)(element, 0)
    else:
        parts = resolve_loss(request.loss, request.output_root).split_batch(element, 0)
    count = sample_count(Batch(0, parts.inputs, None, None, None, parts.mask))
    if not count:
        raise ValueError("example_inputs must hold at least one sample, got none")
    return count


def _run(request: Request, example: _Example, batch_size: int, samples: int) -> _Found:
    """Runs the function on shapes."""
    device = planned_device(example.model)
    batches = batches_of(samples, batch_size)
    few = min(batches, _BATCHES)
    run, rows_run = ShapeRun(device), ShapeRun(device)
    given = example.element, example.samples, batch_size
    passed = 0

    def note(*_: Any) -> None:
        nonlocal passed
        passed = len(run.events)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = shaped_model(rows_run, example.model)
        with rows_run:
            rows = batch_rows(request, model, ShapedBatches(rows_run, *given, 1, device))
        if request.what == "hessians" and request.spill:
            budget = budget_for(request.memory_budget, device, 4 * 2**30, 1 / 4)
            few = batches_until_spilling(rows, batches, budget) or few
        most = enough_rows(request, rows)
        cut = request
        if most < rows.count:
            loss = with_few_rows(resolve_loss(request.loss, request.output_root), most)
            cut = request.changed(loss=loss, output_root=None)
        model = shaped_model(run, example.model)
        with run, on_paper(run.put_elsewhere):
            result = cut.run(model, ShapedBatches(run, *given, few, device), progress=note)
    peak, at_peak = run.peak()
    beyond = held_beyond(request, rows, most, device)
    if beyond:
        peak, at_peak = peak + beyond, {**at_peak, ROWS: at_peak.get(ROWS, 0) + beyond}
    held = held_by(request.what, result)
    stored = dict.fromkeys(held, 0)
    beyond_budget: set[str] = set()
    elsewhere, read_ahead = run.elsewhere(), 0
    kept = total([t for own in held.values() for t in own if not run.lies_elsewhere(t)])
    if request.what == "hessians":
        budget = budget_for(request.memory_budget, device, 4 * 2**30, 1 / 4)
        whole = {name: rows.samples[name] * batches for name in held}
        beyond_budget = _above(whole, budget)
        stored = {name: 0 if name in beyond_budget else whole[name] for name in held}
        if batches > few:
            sums = {name: rows.samples[name] * few for name in held}
            beside = run.peak(passed)[0] - min(budget, sum(sums.values()))
            there = min(budget, sum(whole.values()))
            if request.spill:
                of = rows, beyond_budget, budget
                beside = run.peak(passed)[0] - held_while_spilling(few, *of)
                there = max(held_while_spilling(n, *of) for n in (few, batches))
            joining = min(joined_bytes(device, budget // 8), max(stored.values(), default=0))
            peak = max(there + beside, sum(stored.values()) + joining)
            at_peak = {**at_peak, SAMPLES: 0}
            at_peak[SAMPLES] = peak - sum(at_peak.values())
        kept = sum(stored.values())
        if request.spill:
            elsewhere = sum(whole[name] for name in beyond_budget)
            read_ahead = read_ahead_bytes() if beyond_budget else 0
            stored = whole
    specs, _ = select_layers(example.model, request.layers, request.bias)
    layers = tuple(
        LayerPlan(
            name,
            specs[name].kind,
            specs[name].shape,
            rows.positions.get(name, 0),
            0 if request.what == "hessians" else total(held[name]),
            rows.nbytes.get(name, 0),
            stored[name],
            workspace_of(specs[name], run.kernels),
            name in beyond_budget and request.spill is None,
            name in beyond_budget or any(map(run.lies_elsewhere, held[name])),
        )
        for name in held
    )
    calls = sum(call.name in _TAKEN for call in run.kernels)
    if request.what == "ekfac":
        # Those of the second pass alone.
        calls = sum(call.name in _TAKEN[1:] for call in run.kernels)
    operations = {
        part: n if part == "eigenvectors" else n * batches // few
        for part, n in run.operations.items()
    }
    if most < rows.count:
        operations[ROWS] = operations.get(ROWS, 0) * rows.count // most
    return _Found(
        layers,
        dict(result.skipped),
        rows,
        0 if rows.single else calls // max(1, rows.uses * few),
        peak,
        at_peak,
        kept,
        operations,
        elsewhere,
        read_ahead,
    )


def _above(samples: Mapping[str, int], budget: int) -> set[str]:
    """The layers whose samples a budget does not hold, the largest first."""
    left = dict(samples)
    found: set[str] = set()
    while sum(left.values()) > budget:
        largest = max(left, key=lambda name: left[name])
        found.add(largest)
        del left[largest]
    return found


def _advice(
    request: Request,
    example: _Example,
    batch_size: int,
    samples: int,
    found: _Found,
    room: int | None,
) -> list[str]:
    """What could be changed."""
    texts = []
    anew = [layer.name for layer in found.layers if layer.recomputed]
    if anew:
        needed = sum(found.rows.samples[name] for name in found.rows.samples)
        whole = needed * batches_of(samples, batch_size)
        texts.append(
            f"memory_budget={whole} ({size(whole)}) would store the samples of all layers, "
            "spill='disk' those above the budget in files; as it is the model runs again at every "
            f"product with {', '.join(anew)}"
        )
    exact = request.output == "exact" and request.what != "inputs"
    fits = room is None or found.peak <= room
    if exact and (not fits or found.rows.count >= _MANY_ROWS):
        drawn = _run(request.changed(output="mc"), example, batch_size, samples)
        texts.append(
            f"output='mc' takes {request.mc_samples} of {found.rows.count:,} root rows: a peak of "
            f"{size(drawn.peak)}"
        )
    if fits or room is None:
        return texts
    if request.spill is None and request.what == "factors":
        spilled = _run(request.changed(spill="disk"), example, batch_size, samples)
        if spilled.peak < found.peak:
            texts.append(
                f"spill='disk' has a peak of {size(spilled.peak)}, with {size(spilled.elsewhere)} "
                "in files"
            )
    smaller = batch_size
    while smaller > 1:
        smaller = (smaller + 1) // 2
        less = _run(request, example, smaller, samples)
        if less.peak <= room:
            texts.append(f"batches of {smaller} have a peak of {size(less.peak)}")
            break
    if request.what == "hessians" and found.kept > room // 2:
        budget = room // 4
        less = _run(request.changed(memory_budget=budget), example, batch_size, samples)
        texts.append(
            f"memory_budget={budget} ({size(budget)}) has a peak of {size(less.peak)}: layers "
            "above it run the model again at every product"
            + ("" if request.spill else ", or are read from files with spill='disk'")
        )
    elif found.kept > room:
        largest = max(found.layers, key=lambda layer: layer.factors)
        texts.append(
            f"the result alone takes {size(found.kept)}: leave layers out with layers=[...], the "
            f"largest being {largest.name!r} with {size(largest.factors)}"
        )
    return texts
