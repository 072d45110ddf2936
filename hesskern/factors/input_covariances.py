"""Input covariances of every layer by forward passes alone: the pass, its result, and its file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.choices import Bias
from hesskern.factors.input_rows import BatchRows, Held, Rows, out_of_order
from hesskern.factors.input_sums import InputSums, SharedSums
from hesskern.factors.precision import precisions
from hesskern.factors.rank_inputs import WholeInputs, whole_inputs
from hesskern.factors.result import OfLayer, read_spec
from hesskern.parallel.ranks import Ranks, section_of
from hesskern.parallel.replicas import model_facts
from hesskern.parallel.samplers import weights_of_part
from hesskern.parallel.sharded import whole_model
from hesskern.passes.batches import Batch, batches, sample_count
from hesskern.passes.checks import Checks
from hesskern.passes.forward_pass import model_device
from hesskern.passes.input_batches import inputs_alone
from hesskern.passes.input_capture import InputCapture
from hesskern.passes.layers import (
    LayerSpec,
    left_out,
    refuse_missing,
    select_layers,
    shared_weights,
)
from hesskern.passes.masks import LayerMasks, checked_mask
from hesskern.passes.roots import accumulator_dtype, given_weights
from hesskern.progress import Progress, reporter
from hesskern.tensor_files import TensorFormat

__all__ = ["InputCovariances", "LayerInputs", "input_covariances", "load_input_covariances"]

_FILE = TensorFormat(
    "hesskern.input_covariances/1", "hesskern input covariances", "input covariances file"
)
_FUSED = (
    "is one of several matrices of a parameter, whose inputs hooks cannot see; kronecker_factors "
    "finds them in the graph"
)
_UNREACHED = "was never reached in the forward pass"


@dataclass(frozen=True, eq=False)
class LayerInputs(OfLayer):
    """What one layer is given, as means over samples.

    Attributes:
        spec: the layer's geometry.
        input_covariance: E[x x^T], summed over positions: [d, d], or [g, d, d] with groups; the
            same as :attr:`hesskern.LayerFactors.input_covariance`. Divided by ``positions`` it is
            the mean over positions too.
        input_mean: [d] mean of x over samples and positions, [g d] with groups; with
            ``bias="joint"`` a one stands at its end.
        num_samples: weighted number of samples behind the means.
        positions: positions per sample (calls counted), 1 for plain linear.
    """

    spec: LayerSpec
    input_covariance: Tensor
    input_mean: Tensor
    num_samples: float
    positions: float


class InputCovariances(Mapping[str, LayerInputs]):
    """Input covariances by layer name, of all data seen so far.

    Layers that were always given the same tensor (query, key and value; gate and up) have their
    sums in common; ``result["name"]`` makes the means of one layer anew each time.

    A new one is empty, for :func:`hesskern.input_covariances` to add to:

    >>> seen = InputCovariances()
    >>> for part in parts:
    ...     hk.input_covariances(model, part, accumulate=seen)

    Attributes:
        num_samples: weighted number of samples.
        skipped: modules with parameters that have no covariance here, with the reason.
    """

    def __init__(self) -> None:
        self.num_samples = 0.0
        self.skipped: dict[str, str] = {}
        self._bias: Bias | None = None
        self._specs: dict[str, LayerSpec] = {}
        self._sums = SharedSums()
        self._unfit: dict[str, str] = {}
        self._precisions: dict[str, None] = {}
        self._whole = True

    @property
    def settings(self) -> dict[str, Any]:
        """How they were made: ``bias``, and ``precision`` in words, as :attr:`Factors.settings`."""
        return {"bias": self._bias, "precision": "; ".join(self._precisions)}

    def __getitem__(self, name: str) -> LayerInputs:
        self._require_whole()
        sums = self._sums.by_layer.get(name)
        if sums is None:
            reason = self.skipped.get(name)
            there = ", ".join(self) or "none, as no data was seen yet"
            raise KeyError(
                f"no input covariance for layer {name!r}"
                + (f": it {reason}" if reason else f"; there are {there}")
            )
        spec = self._specs[name]
        # Where all weights are zero, so are all sums.
        mean = sums.column / (sums.positions or 1.0)
        if spec.joint:
            mean = torch.cat([mean, mean.new_ones(1)])
        covariance = sums.covariance(spec, self.num_samples)
        return LayerInputs(
            spec, covariance, mean, self.num_samples, sums.positions / self.num_samples
        )

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._specs if name in self._sums.by_layer)

    def __len__(self) -> int:
        return len(self._sums.by_layer)

    def __contains__(self, name: object) -> bool:
        return name in self._sums.by_layer

    def __repr__(self) -> str:
        rows = [f"  {n}: {self._specs[n].kind} {self._specs[n].shape}" for n in self]
        return "\n".join([f"InputCovariances of {self.num_samples:g} samples:", *rows])

    def merge(self, other: InputCovariances) -> None:
        """Adds what others have seen, with the same layers: of other data, in another process.

        Raises:
            TypeError: ``other`` is not an InputCovariances.
            ValueError: its layers or its bias differ, or one of both cannot have a layer that the
                other has; nothing is added then.
        """
        if not isinstance(other, InputCovariances):
            raise TypeError(f"other must be an InputCovariances, got {type(other).__name__}")
        if other is self:
            other = self._copy()
        self._require_whole()
        other._require_whole()
        if not other._specs:
            return
        self._require_same(other._specs, other._bias, "other has")
        for one, another in ((self, other), (other, self)):
            for name in one._sums.by_layer.keys() & another._unfit.keys():
                raise ValueError(
                    f"other does not fit: layer {name!r} {another._unfit[name]} in one of both and "
                    "has a covariance in the other (leave the layer out with layers=[...])"
                )
        groups: dict[Hashable, list[str]] = {}
        theirs: dict[Hashable, InputSums] = {}
        for name, sums in other._sums.by_layer.items():
            groups.setdefault(id(sums), []).append(name)
            theirs[id(sums)] = sums
        for key, names in groups.items():
            self._require_room(names, theirs[key].squares, "after the merge", theirs[key].inputs)
        empty = {
            key: InputSums.zeros(self_spec, theirs[key].inputs.dtype, theirs[key].inputs.device)
            for key, names in groups.items()
            for self_spec in [other._specs[names[0]]]
        }
        with self._adding():
            for key, mine in self._sums.arrange(groups, empty):
                mine.add(theirs[key])
            self.num_samples += other.num_samples
        self._specs, self._bias = dict(other._specs), other._bias
        self._precisions.update(other._precisions)
        self._unfit = {**other._unfit, **self._unfit}
        reasons = {**other.skipped, **self.skipped}
        self.skipped = {name: text for name, text in reasons.items() if name not in self}

    def _take(self, other: InputCovariances) -> None:
        """:meth:`merge`, of what nobody else holds."""
        if self._specs:
            self.merge(other)
        else:
            self.__dict__.update(other.__dict__)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, to be read by :func:`hesskern.load_input_covariances`.

        The file appears whole or not at all. It holds the sums, to the bit: what is added to those
        read from it is as if nothing had happened in between.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        self._require_whole()
        numbers: dict[int, int] = {}
        tensors: dict[str, Tensor] = {}
        entries = []
        for sums in self._sums.by_layer.values():
            if id(sums) in numbers:
                continue
            number = numbers[id(sums)] = len(numbers)
            tensors[f"{number}.inputs"], tensors[f"{number}.column"] = sums.inputs, sums.column
            entries.append({"squares": sums.squares, "positions": sums.positions})
        header = {
            "num_samples": self.num_samples,
            "bias": self._bias,
            "precisions": list(self._precisions),
            "skipped": self.skipped,
            "unfit": self._unfit,
            "specs": [asdict(spec) for spec in self._specs.values()],
            "sums": entries,
            "layers": {name: numbers[id(sums)] for name, sums in self._sums.by_layer.items()},
        }
        _FILE.write(path, tensors, header)

    def _copy(self) -> InputCovariances:
        copied = InputCovariances()
        copied.__dict__.update(self.__dict__)
        copied._sums = self._sums.copy()
        copied._unfit, copied._precisions = dict(self._unfit), dict(self._precisions)
        return copied

    def _require_whole(self) -> None:
        if not self._whole:
            raise RuntimeError(
                "these input covariances were interrupted while a batch was being added, which is "
                "in some layers' sums and not in others'; begin anew, or from a saved file"
            )

    def _require_same(
        self, specs: Mapping[str, LayerSpec], bias: Bias | None, subject: str
    ) -> None:
        if not self._specs:
            return
        if bias != self._bias:
            raise ValueError(f"{subject} bias={bias!r}, what was accumulated {self._bias!r}")
        if list(specs.items()) != list(self._specs.items()):
            names = [n for n in {**specs, **self._specs} if specs.get(n) != self._specs.get(n)]
            raise ValueError(
                f"{subject} other layers than what was accumulated"
                + (f": {', '.join(map(repr, names[:5]))} differ" if names else "")
            )

    def _require_room(
        self, names: Iterable[str], squares: float, when: str, inputs: Tensor
    ) -> None:
        """Refuses what would overflow in the sums of some layers."""
        most = torch.finfo(inputs.dtype).max
        for name in names:
            known = self._sums.by_layer.get(name)
            if not squares + (0.0 if known is None else known.squares) <= most:
                raise ValueError(
                    f"data: squared inputs of layer {name!r} overflow {inputs.dtype} {when}; "
                    "nothing of it was accumulated"
                )

    def _adding(self) -> _Adding:
        return _Adding(self)


class _Adding:
    """Around what changes sums: whatever breaks off inside leaves them useless, and known to be."""

    def __init__(self, result: InputCovariances) -> None:
        self._result = result

    def __enter__(self) -> None:
        self._result._whole = False

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._result._whole = kind is None


@dataclass
class _Pass:
    """One walk over data that adds to a result.

    Attributes:
        result: what is added to, batch by batch.
        model: runs.
        capture: of it, opened by the caller.
        specs: the layers, by name.
        device: of the model.
    """

    result: InputCovariances
    model: nn.Module
    capture: InputCapture
    specs: dict[str, LayerSpec]
    device: torch.device

    def __post_init__(self) -> None:
        self._ordered: set[str] = set()
        self._held = Held()
        self.capture.unfit.update(self.result._unfit)
        self._alike: dict[str, list[str]] = {}
        for name, first in shared_weights(self.model, self.specs).items():
            self._alike.setdefault(first, [first]).append(name)
        for names in self._alike.values():
            self.capture.unfit.update(self._unlike(names))
        self._refuse()

    def add(self, batch: Batch) -> None:
        """Adds one batch as a whole, or nothing of it."""
        samples = sample_count(batch)
        if not samples:
            return
        with Checks() as checks:
            weight = self._weights(batch, samples, checks)
            masks = LayerMasks(batch, self.specs, samples, self.model, checks)
            given = samples, weight, masks, self._held, self._ordered
            found = self._run(batch, lambda: BatchRows(*given))
            masks.settle()
            checks.close()
        self._leave_out_misfits(batch, found)
        self._count_together(found)
        self._refuse()
        groups: dict[Hashable, list[str]] = {}
        taken: dict[Hashable, Rows] = {}
        for name, calls in found.items():
            if name not in self.capture.unfit:
                # Layers that were given one tensor have its rows in common.
                key: Hashable = tuple(map(id, calls))
                groups.setdefault(key, []).append(name)
                if key not in taken:
                    taken[key] = Rows.joined([call for call in calls if isinstance(call, Rows)])
        squares = self._checked_squares(batch, groups, taken)
        sums = self.result._sums
        empty = {
            key: InputSums.zeros(self.specs[names[0]], _sum_dtype(taken[key]), _device(taken[key]))
            for key, names in groups.items()
            if any(name not in sums.by_layer for name in names)
        }
        with self.result._adding():
            for key, mine in sums.arrange(groups, empty):
                # From a file, they lie on the host.
                device = _device(taken[key])
                mine.inputs, mine.column = mine.inputs.to(device), mine.column.to(device)
                taken[key].add_to(self.specs[groups[key][0]], mine)
                mine.squares += squares[key]
            self.result.num_samples += samples if weight is None else float(weight.sum())
        self.result._unfit = dict(self.capture.unfit)

    def _unlike(self, names: list[str]) -> dict[str, str]:
        """Layers of one weight whose inputs have no sum, with the reason."""
        if len({replace(self.specs[name], name="") for name in names}) == 1:
            return {}
        reason = "shares its weight with {}, which has another geometry, or a bias of its own"
        return {name: reason.format(_others(name, names)) for name in names}

    def _count_together(self, found: dict[str, list[Rows | str]]) -> None:
        """Has layers of one weight see the inputs of all of them: it is one matrix."""
        unfit = self.capture.unfit
        for names in self._alike.values():
            bad = next((name for name in names if name in unfit), None)
            if bad is not None:
                for name in names:
                    unfit.setdefault(name, f"shares its weight with {bad!r}, which {unfit[bad]}")
                continue
            calls = [call for name in names for call in found.get(name, ())]
            if calls:
                found.update(dict.fromkeys(names, calls))

    def _run(self, batch: Batch, taker: Callable[[], BatchRows]) -> dict[str, list[Rows | str]]:
        """Every layer's rows, which nothing has overwritten."""
        versions = _versions(batch.inputs)
        found = self.capture.run(batch, taker)
        if not self._held.overwritten:
            return found
        if _versions(batch.inputs) != versions:
            raise ValueError(
                "model must not overwrite its own inputs in place after a layer has read them; "
                "let its forward() work on a copy"
            )
        # From now on, for what one batch overwrites the next one does as well.
        self._held.copy = True
        del found
        return self.capture.run(batch, taker)

    def _refuse(self) -> None:
        """Raises the reason of a layer that was asked for, or had a covariance before."""
        for name, reason in self.capture.unfit.items():
            if name in self.specs and (
                self.specs[name].required or name in self.result._sums.by_layer
            ):
                raise ValueError(
                    f"layer {name!r} {reason} (leave the layer out with layers=[...]; "
                    "kronecker_factors finds inputs in the graph)"
                )

    def _weights(self, batch: Batch, samples: int, checks: Checks) -> Tensor | None:
        """[N] float64 weights of the samples on the model's device; None where all are one."""
        weight = given_weights(batch, samples, checks)
        if weight is None or bool((weight == 1).all()):
            return None
        return weight.to(self.device, torch.float64)

    def _leave_out_misfits(self, batch: Batch, found: Mapping[str, list[Rows | str]]) -> None:
        """Notes layers of whose rows it cannot be told which ones count."""
        unsure = {}
        for name, calls in found.items():
            reason = next((call for call in calls if isinstance(call, str)), None)
            if reason is not None:
                self.capture.unfit[name] = reason
                continue
            last = [x for call in calls if isinstance(call, Rows) for x in call.last]
            if last and name not in self._ordered:
                unsure[name] = last
        if unsure:
            self.capture.unfit.update(out_of_order(self.capture, batch, unsure))
            # Of samples that are all alike, any order looks right: the next batch is looked at too.
            self._ordered.update(
                name for name, last in unsure.items() if all(bool(one.tells) for one in last)
            )

    def _checked_squares(
        self, batch: Batch, groups: Mapping[Hashable, list[str]], taken: Mapping[Hashable, Rows]
    ) -> dict[Hashable, float]:
        """Sums of squares by group: finite, also beside those that were added before."""
        by_device: dict[torch.device, list[Hashable]] = {}
        for key, rows in taken.items():
            by_device.setdefault(rows.squares.device, []).append(key)
        squares: dict[Hashable, float] = {}
        for keys in by_device.values():
            values = torch.stack([taken[key].squares.double() for key in keys]).tolist()
            squares.update(zip(keys, values, strict=True))
        for key, names in groups.items():
            calls = taken[key].calls
            if not math.isfinite(squares[key]) and not all(_finite(x) for x in calls):
                raise ValueError(
                    f"data: inputs of layer {names[0]!r} contain NaN or Inf in batch "
                    f"{batch.index}; nothing of this batch was accumulated"
                )
            when = f"in batch {batch.index}"
            self.result._require_room(names, squares[key], when, taken[key].column)
        return squares


def _others(name: str, names: list[str]) -> str:
    return ", ".join(repr(other) for other in names if other != name)


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _versions(inputs: Any) -> list[int]:
    """Version counters of the tensors in a batch's inputs."""
    if isinstance(inputs, Tensor):
        return [inputs._version]
    if isinstance(inputs, Mapping):
        inputs = inputs.values()
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
        return []
    return [version for value in inputs for version in _versions(value)]


def _device(rows: Rows) -> torch.device:
    return rows.column.device


def _sum_dtype(rows: Rows) -> torch.dtype:
    wide = any(accumulator_dtype(x.dtype) == torch.float64 for x in rows.calls)
    return torch.float64 if wide else torch.float32


def input_covariances(
    model: nn.Module,
    data: Iterable[Any],
    layers: str | Iterable[str] | None = None,
    bias: Bias = "none",
    accumulate: InputCovariances | None = None,
    *,
    sample_weight: Tensor | None = None,
    position_mask: Callable[[Any], Any] | None = None,
    progress: bool | Progress = False,
    group: Any = None,
) -> InputCovariances:
    """E[x x^T] of every layer's inputs, by forward passes alone: no loss, no targets, no backward.

    The same as ``kronecker_factors(...)[name].input_covariance`` (but for losses that leave out
    samples without labels, or count tokens), at the price of little more than the model's forward
    pass: for GPTQ, SparseGPT, activation-aware scales, low-rank compression.
    Layers that share one weight have the inputs of all of them; calls whose result gets no gradient
    count as well.

    Inputs are seen by forward hooks. A layer whose weight anything else than its own module's
    forward() multiplies with (a function, ``nn.MultiheadAttention``, a module of another package
    with a forward() of its own) is left out, with the reason in ``.skipped``; that nothing does is
    checked, operation by operation, on the first batch and on each in which a layer is called for
    the first time. It is not checked of weights that are computed from other parameters
    (parametrizations), and looking up rows of a weight (a tied embedding) is no product.

    Args:
        model: any module; runs in eval mode, without gradients, and comes back as it was. What it
            returns does not matter.
        data: iterable of batches: tensors, dicts (also those of ``transformers``), or tuples
            (inputs,), (inputs, targets), (inputs, targets, weight [N]), where inputs are a tensor,
            a tuple of arguments or a dict of them, and targets are ignored. The first axis of the
            inputs' first tensor counts the samples; in a dict, that of ``input_ids`` and other
            usual names, or of the mask. ``labels`` in a dict are left out, as they
            would make the model compute a loss.
        layers: names from ``model.named_modules()`` or patterns such as ``"*.mlp.*"``, one or
            several; None for all that hooks can see.
        bias: "none": weights only; "joint": append 1 to x where the layer has a bias.
        accumulate: what earlier calls with the same layers returned, or ``InputCovariances()``: is
            added to in place and returned. A batch that fails ends the call and is not in it; the
            batches before it are.
        sample_weight: [total samples] non-negative weights of the samples, in the order of the
            data; means become weighted means. With it, all of the data is added or nothing.
        position_mask: which positions are data, as in :func:`hesskern.kronecker_factors`; without
            it the ``attention_mask`` [N, T] of a dict tells. A masked position counts nowhere.
        progress: True for a bar with the time left, or a callback (description, done, total).
        group: ranks of torch.distributed that all call this, each with its own part of the data, as
            in :func:`hesskern.kronecker_factors`; all get the input covariances of all data.
            ``accumulate`` is what earlier calls in the group returned; where one rank fails,
            nothing is added on any.

    Returns:
        :class:`InputCovariances`, keyed by layer name, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: bad arguments; NaN or Inf in a layer's inputs (names layer and batch); a mask of
            another shape, or one that leaves nothing of a batch; no data at all; a layer that was
            asked for by name is never reached, or hooks cannot see its inputs.
        TypeError: arguments of a wrong type, batches of another form.
        NotImplementedError: unsupported layers asked for by name.
        RankError: with a group, ranks have other models, weights or layers, or another rank has
            failed or ended.

    Warns:
        UserWarning: naming linear layers and convolutions that were left out, and why.
    """
    if accumulate is not None and not isinstance(accumulate, InputCovariances):
        raise TypeError(
            f"accumulate must be an InputCovariances or None, got {type(accumulate).__name__}"
        )
    checked_mask(position_mask)
    ranks = Ranks.of(group)
    with section_of(ranks, "input covariances"), whole_model(ranks, model) as inner:
        model = inner
        specs, skipped = select_layers(model, layers, bias)
        # Hooks see what a module is given, not which rows of it go to which of its experts.
        fused = {name: _FUSED for name, spec in specs.items() if spec.expert is not None}
        refuse_missing(specs, fused)
        specs = {name: spec for name, spec in specs.items() if name not in fused}
        skipped.update(fused)
        report = reporter(progress)
        result = InputCovariances() if accumulate is None else accumulate
        result._require_whole()
        result._require_same(specs, bias, "this call has")
        # What is added over ranks is what they have seen now.
        seen = result if ranks is None else InputCovariances()
        if ranks is not None:
            seen._unfit = dict(result._unfit)
            facts = _facts(model, specs, bias, result)
            facts["position_mask given"] = position_mask is not None
            ranks.agree("input covariances", facts)
            sample_weight = weights_of_part(ranks, data, sample_weight, 2)
            report = ranks.watching("input covariances", report)
        before = seen._copy() if sample_weight is not None and len(seen) else None
        device = model_device(model)
        now = precisions(model, device)
        given = data, device, sample_weight, report, "input covariances"
        try:
            with InputCapture(model, specs) as capture:
                run = _Pass(seen, model, capture, specs, device)
                seen._specs, seen._bias = specs, bias
                for batch in batches(*given, inputs_alone(model), position_mask):
                    run.add(batch)
                    seen._precisions.update(dict.fromkeys(now))
        except BaseException:
            if sample_weight is not None:
                seen.__dict__.update((InputCovariances() if before is None else before).__dict__)
            raise
        if ranks is not None:
            result._take(_over_ranks(ranks, seen, capture.unfit, device))
        unfit = capture.unfit if ranks is None else result._unfit
        _finish(result, model, specs, skipped, unfit, layers is not None)
        return result


def _facts(
    model: nn.Module, specs: Mapping[str, LayerSpec], bias: Bias, before: InputCovariances
) -> dict[str, Any]:
    """What all ranks have to have alike."""
    return {
        "layers": list(specs),
        "geometry": [asdict(spec) for spec in specs.values()],
        "bias": bias,
        "samples accumulated before": before.num_samples,
        **model_facts(model),
    }


def _over_ranks(
    ranks: Ranks, seen: InputCovariances, unfit: Mapping[str, str], device: torch.device
) -> InputCovariances:
    """What all ranks have seen; takes the sums of this one."""
    own = WholeInputs(seen.num_samples, seen._sums, dict(unfit), list(seen._precisions))
    found = whole_inputs(ranks, seen._specs, own, device)
    whole = InputCovariances()
    whole.num_samples, whole._sums, whole._unfit = found.count, found.sums, found.unfit
    whole._specs, whole._bias = seen._specs, seen._bias
    whole._precisions = dict.fromkeys(found.precisions)
    for name, sums in whole._sums.by_layer.items():
        InputCovariances()._require_room([name], sums.squares, "over all ranks", sums.inputs)
    return whole


def _finish(
    result: InputCovariances,
    model: nn.Module,
    specs: Mapping[str, LayerSpec],
    skipped: Mapping[str, str],
    unfit: Mapping[str, str],
    by_name: bool,
) -> None:
    """Says what a result lacks.

    Raises:
        ValueError: it has nothing, or lacks a layer that was asked for.
    """
    reasons = {name: unfit.get(name, _UNREACHED) for name in specs if name not in result}
    result.skipped = {**skipped, **reasons}
    if not result.num_samples > 0:
        raise ValueError("data yielded no samples, so there are no input covariances")
    refuse_missing(specs, reasons)
    if not len(result):
        listed = "; ".join(f"{name!r} {reason}" for name, reason in reasons.items())
        raise ValueError(f"no layer of the model has an input covariance: {listed}")
    covered = [specs[name] for name in result]
    result.skipped = left_out(model, result.skipped, covered, None if by_name else 3)


def load_input_covariances(
    path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> InputCovariances:
    """Reads a file written by :meth:`InputCovariances.save`; more can be added to what it held.

    Args:
        path: the file.
        device: where the tensors go.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of these, or is damaged.
    """
    with _FILE.opened(path) as file:
        header = file.header
        specs = [read_spec(entry) for entry in header["specs"]]
        result = InputCovariances()
        result.num_samples, result._bias = header["num_samples"], header["bias"]
        result.skipped, result._unfit = dict(header["skipped"]), dict(header["unfit"])
        result._precisions = dict.fromkeys(header["precisions"])
        result._specs = {spec.name: spec for spec in specs}
        sums = [
            InputSums(
                file.tensor(f"{number}.inputs").to(device),
                file.tensor(f"{number}.column").to(device),
                entry["squares"],
                entry["positions"],
            )
            for number, entry in enumerate(header["sums"])
        ]
        for name, number in header["layers"].items():
            spec, own = result._specs[name], sums[number]
            empty = InputSums.zeros(spec, own.inputs.dtype, torch.device("meta"))
            if own.inputs.shape != empty.inputs.shape or own.column.shape != empty.column.shape:
                raise ValueError(
                    f"path: {str(path)!r} is damaged: the sums of layer {name!r} do not have its "
                    f"shape {spec.shape}"
                )
            result._sums.by_layer[name] = own
        return result
