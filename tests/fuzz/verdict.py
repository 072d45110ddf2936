"""What hesskern says about a case, held against the reference."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import hesskern as hk
from fuzz.grammar import Case
from fuzz.reference import Reference, plain_torch, weight_name
from fuzz.state import Snapshot

__all__ = ["BAD", "ENTRIES", "Finding", "Verdict", "judge"]

BAD = ("WRONG", "DROPPED", "CRASH", "CHANGED")

ENTRIES = ("layer_hessians", "kronecker_factors", "GaussNewton", "AutogradHessian")

_UNKNOWN = "torch has no second derivative"

_FLAG = re.compile(
    r"not (the|a) block|leaves? out|left out|does not (include|count|hold)|own calls|calls alone|"
    r"without (its|the) other|not counted"
)


@dataclass(frozen=True)
class Finding:
    """One answer.

    Attributes:
        entry: which function.
        layer: key, or "*" for the whole call.
        outcome: "right", "refused", "flagged", "unchecked", "WRONG", "DROPPED" (left out without
            a reason), "CRASH" or "CHANGED" (something did not come back as it was).
        detail: for a person.
    """

    entry: str
    layer: str
    outcome: str
    detail: str = ""


@dataclass
class Verdict:
    """All answers about a case.

    Attributes:
        findings: in the order of the calls.
        inexact: layers called inexact, and of them those whose block is the Hessian.
    """

    case: Case
    findings: list[Finding] = field(default_factory=list)
    inexact: int = 0
    needlessly: int = 0

    @property
    def bad(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.outcome in BAD]


Answer = Callable[..., Any]


def judge(case: Case, functions: Mapping[str, Answer] | None = None) -> Verdict:
    """Runs every entry point on a case.

    Args:
        case: to be judged.
        functions: in place of hesskern's own, by name; for tests of the fuzzer itself.
    """
    answers = {**{name: getattr(hk, name) for name in ENTRIES}, **(functions or {})}
    with warnings.catch_warnings():
        # hesskern's own say what the findings say; torch's are about the random models.
        warnings.simplefilter("ignore")
        verdict = _Judge(case, answers).run()
        if case.dtype == torch.float64 or {f.outcome for f in verdict.bad} != {"WRONG"}:
            return verdict
        # Rounding may carry a unit over its kink: torch in the same precision is right as well.
        again = _Judge(replace(case, own_precision=True), answers).run()
        return verdict if again.bad else again


class _Judge:
    def __init__(self, case: Case, functions: Mapping[str, Answer]) -> None:
        self.case, self.functions = case, functions
        self.verdict = Verdict(case)
        self.model, self.data = case.model(), case.data()
        self.reference = Reference(case)
        self._check_reference()
        self.narrow = case.dtype != torch.float64
        self.held = _modules_with_weights(self.model)
        self._random = torch.Generator().manual_seed(case.values)

    def _check_reference(self) -> None:
        """The program and its reference are one function."""
        if self.case.program.random or self.case.dtype != torch.float64:
            return
        model = self.case.model().eval()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        other = self.case.reference(lambda name, x, z: z)
        with plain_torch():
            for batch in self.case.batches:
                one, two = (m(*self.case.wide_inputs(batch)) for m in (model, other))
                if not torch.allclose(one, two, rtol=1e-10, atol=1e-10):
                    raise AssertionError(
                        f"seed {self.case.seed}: the reference is another function"
                    )

    # Calls

    def run(self) -> Verdict:
        self._call("layer_hessians", self._see_hessians)
        self._call("kronecker_factors", self._see_factors)
        self._call("GaussNewton", self._see_gauss_newton)
        self._call("AutogradHessian", self._see_autograd)
        return self.verdict

    def _call(self, entry: str, see: Callable[[Any], None]) -> None:
        before = Snapshot(self.model, self.data)
        try:
            result = self._made(entry, {})
            self._note_changes(entry, before)
            if self.case.program.random:
                self._see_random(entry, result)
            else:
                see(result)
        except AssertionError:
            raise
        except Exception as error:
            self._add(entry, "*", *_thrown(error, self.model))
            self._note_changes(entry, before)

    def _made(self, entry: str, options: dict[str, Any]) -> Any:
        function = self.functions[entry]
        if self.case.sample_weight is not None:
            options["sample_weight"] = self.case.sample_weight
        if entry == "AutogradHessian":
            options["params"] = self._autograd_names()
        return function(self.model, self.data, self.case.loss.loss, **options)

    def _note_changes(self, entry: str, before: Snapshot) -> None:
        changes = before.changes()
        if self.case.program.random:
            changes = [change for change in changes if change != "random state"]
        if changes:
            self._add(entry, "*", "CHANGED", ", ".join(changes[:5]))

    def _add(self, entry: str, layer: str, outcome: str, detail: str = "") -> None:
        self.verdict.findings.append(Finding(entry, layer, outcome, detail))

    # Answers

    def _see_random(self, entry: str, result: Any) -> None:
        """A number for a model that draws is right where every draw leads to it."""
        first = self._numbers(entry, result)
        for _ in range(8):
            again = self._numbers(entry, self._made(entry, {}))
            if any(self._error(b, a) is not None for a, b in zip(first, again, strict=True)):
                self._add(entry, "*", "WRONG", "a number for a model that is random")
                return
        self._add(entry, "*", "right", "no draw matters")

    def _numbers(self, entry: str, result: Any) -> list[Tensor]:
        if entry == "layer_hessians":
            return [H.to_dense().double() for H in result.values()]
        if entry == "kronecker_factors":
            return [
                getattr(f, what).double()
                for f in result.values()
                for what in ("input_covariance", "output_hessian")
            ]
        return [result.to_dense().double()]

    def _account(self, entry: str, keys: list[str], skipped: Mapping[str, str] | None) -> None:
        """Every module that holds weights is answered for or skipped with a reason."""
        for name, module in self.held.items():
            if any(key == name or _inside(key, name, module) for key in keys):
                continue
            reason = _reason(name, skipped)
            if reason is None:
                kind = type(module).__name__
                self._add(entry, name, "DROPPED", f"{kind} is neither there nor in .skipped")
            elif _is_layer(module):
                self._add(entry, name, "refused", reason)

    def _see_hessians(self, result: Mapping[str, Any]) -> None:
        entry = "layer_hessians"
        self._account(entry, list(result), getattr(result, "skipped", None))
        for key, H in result.items():
            name = weight_name(key, self.reference.slices)
            if name is None:
                self._add(entry, key, "WRONG", "a number for a weight that has no such block")
                continue
            part = self.reference.slices[name]
            expected = self.reference.gauss_newton[part, part]
            dense = self._dense(H)
            error = self._error(dense, expected)
            if error is not None:
                reason = H.inexact_reason or ""
                outcome = "flagged" if _FLAG.search(reason) else "WRONG"
                self._add(entry, key, outcome, f"{error}; is_exact={H.is_exact} ({reason})")
                continue
            self._see_exactness(key, name, H, expected)

    def _dense(self, H: Any) -> Tensor:
        """Once by products and once at once; they agree, or the answer is not one matrix."""
        dense = H.to_dense()
        eye = torch.eye(dense.shape[0], dtype=dense.dtype)
        products = H @ eye
        if self._error(products, dense.double(), own=dense) is not None:
            raise _Inconsistent("products and to_dense() differ")
        limit = max(1e-8, self.case.program.tolerance)
        if not self.narrow and abs(H.trace() - float(dense.trace())) > limit * (
            abs(H.trace()) + self.reference.scale
        ):
            raise _Inconsistent("trace() and to_dense() differ")
        return dense

    def _see_exactness(self, key: str, name: str, H: Any, expected: Tensor) -> None:
        entry = "layer_hessians"
        if self.narrow:
            self._add(entry, key, "right")
            return
        # A random vector shows a difference with probability one.
        vectors = self._vectors(len(expected))
        difference = self._difference(name, expected, vectors, False)
        if not H.is_exact:
            self.verdict.inexact += 1
            self.verdict.needlessly += difference is None
            self._add(entry, key, "right")
        elif difference == _UNKNOWN:
            self._add(entry, key, "unchecked", "no second derivative")
        elif difference is not None:
            self._add(entry, key, "WRONG", f"is_exact=True, but double backward: {difference}")
        elif self.case.program.cuts and self._difference(name, expected, vectors, True) is not None:
            self._add(entry, key, "WRONG", "is_exact=True, but the model leaves derivatives out")
        else:
            self._add(entry, key, "right")

    def _vectors(self, size: int) -> Tensor:
        return torch.randn(size, 2, generator=self._random, dtype=torch.float64)

    def _difference(self, name: str, block: Tensor, vectors: Tensor, through: bool) -> str | None:
        """How a block differs from the Hessian, or None."""
        try:
            products = self.reference.hessian_product([name], vectors, through)
        except RuntimeError:
            return _UNKNOWN
        return self._error(products, block @ vectors, 1e-8)

    def _see_factors(self, factors: Any) -> None:
        entry = "kronecker_factors"
        self._account(entry, list(factors), factors.skipped)
        for key, f in factors.items():
            if weight_name(key, self.reference.slices) is None:
                self._add(entry, key, "WRONG", "a number for a weight that has no such block")
                continue
            right = self.reference.layers.get(key)
            errors, checked = [], 0
            for what in ("input_covariance", "output_hessian"):
                expected = None if right is None else getattr(right, what)
                if expected is None:
                    continue
                checked += 1
                error = self._error(getattr(f, what), expected, floor=1e-12)
                if error is not None:
                    errors.append(f"{what}: {error}")
            if abs(factors.num_samples - self.reference.count) > 1e-2 * (self.narrow or 1e-8):
                errors.append(f"num_samples {factors.num_samples}, not {self.reference.count}")
            if errors:
                self._add(entry, key, "WRONG", "; ".join(errors))
            else:
                self._add(entry, key, "right" if checked == 2 else "unchecked")

    def _see_gauss_newton(self, G: Any) -> None:
        entry = "GaussNewton"
        keys = list(G.slices)
        self._account(entry, keys, G.skipped)
        names = [weight_name(key, self.reference.slices) for key in keys]
        if None in names:
            self._add(entry, "*", "WRONG", "a number for a model that has no such matrix")
            return
        parts = [self.reference.slices[name] for name in names if name is not None]
        order = torch.cat([torch.arange(part.start, part.stop) for part in parts])
        expected = self.reference.gauss_newton[order][:, order]
        dense = self._dense(G)
        if self._error(dense, expected) is None:
            for key in keys:
                self._add(entry, key, "right")
            return
        for key in keys:
            rows = G.slices[key]
            error = self._error(dense[rows], expected[rows])
            self._add(entry, key, "right" if error is None else "WRONG", error or "")

    def _autograd_names(self) -> list[str]:
        """Weights of at most two layers."""
        named = dict(self.model.named_parameters())
        weights = [name for name, p in named.items() if p.dim() > 1 and not p.is_complex()]
        names = sorted(weights or list(named), key=lambda name: (name * 7)[-9::-2])[:2]
        return [name for name in named if name in names]

    def _see_autograd(self, R: Any) -> None:
        entry = "AutogradHessian"
        names = self._autograd_names()
        size = sum(dict(self.model.named_parameters())[name].numel() for name in names)
        vectors = self._vectors(size)
        products = R @ vectors.to(R.dtype)
        label = "+".join(names)
        if self.narrow or any(name not in self.reference.slices for name in names):
            self._add(entry, label, "unchecked")
            return
        try:
            expected = self.reference.hessian_product(names, vectors)
        except RuntimeError:
            self._add(entry, label, "unchecked", "no second derivative")
            return
        error = self._error(products, expected, 1e-8)
        self._add(entry, label, "right" if error is None else "WRONG", error or "")

    # Numbers

    def _error(
        self,
        actual: Tensor,
        expected: Tensor,
        tolerance: float = 0.0,
        floor: float = 1e-11,
        own: Tensor | None = None,
    ) -> str | None:
        """What is wrong with a matrix, or None."""
        if actual.shape != expected.shape:
            return f"shape {list(actual.shape)}, not {list(expected.shape)}"
        limit = max(tolerance, self.case.program.tolerance)
        if self.case.dtype == torch.float32:
            limit = 2e-3
        if self.case.dtype == torch.bfloat16:
            limit = 0.25
        difference = float((actual.double() - expected).norm())
        scale = float(expected.norm())
        slack = (limit / 1e-9 if self.narrow else 1.0) * floor * max(self.reference.scale, 1.0)
        both_lack = bool(actual.isnan().any()) and bool(expected.isnan().any())
        if difference <= limit * scale + slack or both_lack:
            return None
        return f"norm {float(actual.double().norm()):.6g}, not {scale:.6g} (off {difference:.2g})"


class _Inconsistent(Exception):
    """One object gives two answers."""


def _modules_with_weights(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }


def _is_layer(module: nn.Module) -> bool:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return isinstance(module, kinds) or type(module).__name__ in ("Conv1D", "MultiheadAttention")


def _inside(key: str, name: str, module: nn.Module) -> bool:
    """Whether a key stands for a weight of a module that holds several, as attention does."""
    prefix = f"{name}." if name else ""
    own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
    return key.startswith(prefix) and any(
        key[len(prefix) :] in (parameter, parameter.removesuffix("_weight")) for parameter in own
    )


def _reason(name: str, skipped: Mapping[str, str] | None) -> str | None:
    if not skipped:
        return None
    if name in skipped:
        return str(skipped[name])
    prefix = f"{name}." if name else ""
    inside = [reason for key, reason in skipped.items() if prefix and key.startswith(prefix)]
    if not prefix:
        # Parameters of the model itself are keyed by their own names.
        inside = [reason for key, reason in skipped.items() if "." not in key]
    return str(inside[0]) if inside else None


def _thrown(error: Exception, model: nn.Module) -> tuple[str, str]:
    """Outcome and detail of an exception: a refusal is one by hesskern that names what it is."""
    frames = traceback.extract_tb(error.__traceback__)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, _Inconsistent):
        return "WRONG", str(error)
    own = frames[-1].filename.replace("\\", "/").rsplit("/", 2)[-2] == "hesskern"
    words = r"\b(model|layers?|data|loss|targets?|outputs?|params|inputs?|sample_weight|module)\b"
    if type(error) in (ValueError, TypeError, NotImplementedError) and own:
        names = [name for name, _ in model.named_modules() if name]
        if re.search(words, str(error)) or any(f"{name!r}" in str(error) for name in names):
            return "refused", text[:300]
    place = next((f for f in reversed(frames) if "/hesskern/" in f.filename), frames[-1])
    return "CRASH", f"{text[:200]} (at {place.filename.rsplit('/', 1)[-1]}:{place.lineno})"
