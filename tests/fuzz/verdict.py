"""What hesskern says about a case, held against the reference."""

from __future__ import annotations

import random
import re
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hesskern as hk
from fuzz.grammar import Case
from fuzz.program import plain_torch
from fuzz.reference import LayerReference, Reference, weight_name
from fuzz.state import Snapshot

__all__ = ["BAD", "ENTRIES", "Finding", "Judge", "Verdict", "judge", "thrown"]

BAD = ("WRONG", "DROPPED", "CRASH", "CHANGED")

# Of the scale of the Gauss-Newton matrix: an E[M] that small may hang on ties between positions
# inside a module, which ``steady`` does not see.
_FACTOR_FLOOR = 1e-10

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


def judge(
    case: Case, functions: Mapping[str, Answer] | None = None, thorough: bool = False
) -> Verdict:
    """Runs every entry point on a case.

    Args:
        case: to be judged.
        functions: in place of hesskern's own, by name; for tests of the fuzzer itself.
        thorough: whether all that is built on factors is asked for, instead of some of it.
    """
    from fuzz.algebra import ALGEBRA
    from fuzz.curvature import CURVATURE

    names = (*ENTRIES, "ekfac", "influence", "input_covariances")
    answers = {**{name: getattr(hk, name) for name in names}, **(functions or {})}
    with warnings.catch_warnings():
        # hesskern's own say what the findings say; torch's are about the random models.
        warnings.simplefilter("ignore")
        judge = Judge(case, answers)
        judge.run()
        if not case.program.random and judge.factors:
            rng = random.Random(case.values + 1)
            for check in (*CURVATURE, *ALGEBRA):
                if thorough or rng.random() < 0.06:
                    check(judge, random.Random(rng.getrandbits(31)))
        return judge.verdict


class Judge:
    """One case, its reference, and what has been found about it."""

    def __init__(self, case: Case, functions: Mapping[str, Answer]) -> None:
        self.case, self.functions = case, functions
        self.verdict = Verdict(case)
        self.model, self.data = case.model(), case.data()
        self.reference = Reference(case)
        self._check_reference()
        self.narrow = case.dtype != torch.float64
        self.rough = self.narrow and self._torchs_own_error() > self._limit / 5
        self.held = _modules_with_weights(self.model)
        self.hessians: Mapping[str, Any] = {}
        self.factors: Mapping[str, Any] = {}
        self._random = torch.Generator().manual_seed(case.values)

    @property
    def _limit(self) -> float:
        """Relative tolerance."""
        if self.case.dtype == torch.bfloat16:
            return 0.25
        return 2e-3 if self.case.dtype == torch.float32 else self.case.program.tolerance

    def _torchs_own_error(self) -> float:
        """Largest relative error of a weight's block that torch itself computes in this dtype."""
        same = Reference(self.case, wide=False)
        errors = [0.0]
        for part in self.reference.slices.values():
            block = self.reference.gauss_newton[part, part]
            norm = float(block.norm())
            if norm > 1e-9:
                errors.append(float((same.gauss_newton[part, part] - block).norm()) / norm)
        worst = max(errors)
        return worst if worst == worst else float("inf")

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
                one, two = (m(*self.case.inputs(batch)) for m in (model, other))
                one, two = (getattr(out, "logits", out) for out in (one, two))
                if not torch.allclose(one, two, rtol=1e-10, atol=1e-10):
                    raise AssertionError(
                        f"seed {self.case.seed}: the reference is another function"
                    )

    # Calls

    def run(self) -> Verdict:
        self.call("layer_hessians", self._see_hessians)
        self.call("kronecker_factors", self._see_factors)
        self.call("GaussNewton", self._see_gauss_newton)
        self.call("AutogradHessian", self._see_autograd)
        if not self.case.program.random and self.hessians:
            self._more(random.Random(self.case.values))
        return self.verdict

    def _more(self, rng: random.Random) -> None:
        """Some of the other ways to ask, a few for every case."""
        kind = self.case.loss.kind
        names = [key for key in self.hessians if key in self.held]

        def blocks(what: str, joint: bool = False) -> Callable[[Any], None]:
            return lambda result: self._see_blocks(f"layer_hessians {what}", result, joint)

        if rng.random() < 0.15:
            self.call("layer_hessians again", self._see_again)
        if rng.random() < 0.15 and names:
            self.call("layer_hessians by name", blocks("by name"), layers=[rng.choice(names)])
        if rng.random() < 0.1:
            self.call("layer_hessians in parts", blocks("in parts"), memory_budget=1)
        if rng.random() < 0.1:
            self.call(
                "GaussNewton in parts",
                lambda result: self._see_matrix("GaussNewton in parts", result),
                memory_budget=1,
            )
        if rng.random() < 0.15:
            self.call("layer_hessians joint", blocks("joint", True), bias="joint")
        if rng.random() < 0.1:
            self.call(
                "kronecker_factors in parts",
                lambda result: self.see_layers("kronecker_factors in parts", result),
                memory_budget=1,
            )
        tokens = any(batch.targets.dim() > 1 for batch in self.case.batches)
        if rng.random() < 0.15 and (kind == "custom" or (kind == "ce" and not tokens)):
            self.call(
                "kronecker_factors empirical",
                lambda result: self.see_layers("kronecker_factors empirical", result, "empirical"),
                output="empirical",
            )
        if rng.random() < 0.05 and not self.narrow:
            self._see_sampled()

    def _see_again(self, result: Mapping[str, Any]) -> None:
        entry = "layer_hessians again"
        if list(result) != list(self.hessians):
            self.add(entry, "*", "WRONG", f"{list(result)}, before {list(self.hessians)}")
            return
        for key, H in result.items():
            now, before = H.to_dense(), self.hessians[key].to_dense()
            same = now.shape == before.shape and bool(torch.equal(now, before))
            same = same and H.inexact_reason == self.hessians[key].inexact_reason
            self.add(entry, key, "right" if same else "WRONG", "" if same else "not as before")

    def _see_sampled(self) -> None:
        """E[M] from drawn targets, in the mean over seeds: along the exact one it is one."""
        entry = "kronecker_factors mc"
        if self.reference.rarest < 0.04:
            self.add(entry, "*", "unchecked", "targets that are drawn too rarely")
            return
        draws: dict[str, list[float]] = {}
        try:
            for seed in range(16):
                factors = self.made(
                    "kronecker_factors", {"output": "mc", "mc_samples": 32, "seed": seed}
                )
                for key, f in factors.items():
                    right = self.reference.layers.get(key, LayerReference()).output_hessian
                    if right is not None and float(right.norm()) > 1e-9:
                        share = float((f.output_hessian * right).sum() / right.square().sum())
                        draws.setdefault(key, []).append(share)
        except Exception as error:
            self.add(entry, "*", *thrown(error, self.model))
            return
        for key, shares in draws.items():
            values = torch.tensor(shares, dtype=torch.float64)
            # Seven standard errors of 16 draws: by chance once in some 10^5 layers.
            limit = 7 * float(values.std()) / len(shares) ** 0.5 + 1e-9
            off = abs(float(values.mean()) - 1)
            detail = f"{float(values.mean()):.4f} of the exact one, within {limit:.2g} is chance"
            self.add(entry, key, "right" if off <= limit else "WRONG", detail)

    def call(self, entry: str, see: Callable[[Any], None], **options: Any) -> None:
        """One answer of a function that takes model, data and loss."""
        self.watched(entry, lambda: self.made(entry.split(" ", 1)[0], options), see)

    def watched(self, entry: str, make: Callable[[], Any], see: Callable[[Any], None]) -> None:
        """One answer, looked at if there is one; what it has changed is found."""
        before = Snapshot(self.model, self.data)
        try:
            result = make()
            self._note_changes(entry, before)
            if self.case.program.random:
                self._see_random(entry, result)
            else:
                see(result)
        except AssertionError:
            raise
        except Exception as error:
            self.add(entry, "*", *thrown(error, self.model))
            self._note_changes(entry, before)

    def _see_random(self, entry: str, result: Any) -> None:
        """A number for a model that draws is right where every draw leads to it."""
        first = _numbers(entry, result)
        for _ in range(8):
            again = _numbers(entry, self.made(entry, {}))
            if any(self.error(b, a) is not None for a, b in zip(first, again, strict=True)):
                self.add(entry, "*", "WRONG", "a number for a model that is random")
                return
        self.add(entry, "*", "right", "no draw matters")

    def made(self, entry: str, options: dict[str, Any]) -> Any:
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
            self.add(entry, "*", "CHANGED", ", ".join(changes[:5]))

    def add(self, entry: str, layer: str, outcome: str, detail: str = "") -> None:
        if self.rough and outcome in ("right", "WRONG"):
            outcome, detail = "unchecked", "torch's own error in this dtype is too large"
        self.verdict.findings.append(Finding(entry, layer, outcome, detail))

    # Answers

    def account(self, entry: str, keys: list[str], skipped: Mapping[str, str] | None) -> None:
        """Every module that holds weights is answered for or skipped with a reason."""
        for name, module in self.held.items():
            if any(key == name or _inside(key, name, module) for key in keys):
                continue
            reason = _reason(name, module, skipped)
            if reason is None:
                kind = type(module).__name__
                self.add(entry, name, "DROPPED", f"{kind} is neither there nor in .skipped")
            elif _is_layer(module):
                self.add(entry, name, "refused", reason)

    def _see_hessians(self, result: Mapping[str, Any]) -> None:
        self.account("layer_hessians", list(result), getattr(result, "skipped", None))
        self._see_blocks("layer_hessians", result)
        self.hessians = result

    def _see_blocks(self, entry: str, result: Mapping[str, Any], joint: bool = False) -> None:
        for key, H in result.items():
            order = self.entries(key, joint)
            if order is None:
                self.add(entry, key, "WRONG", "a number for a weight that has no such block")
                continue
            expected = self.reference.gauss_newton[order][:, order]
            dense = self.dense(H)
            error = self.error(dense, expected)
            if error is not None:
                error = self._other_order(key, dense, expected) or error
                reason = H.inexact_reason or ""
                outcome = "flagged" if _FLAG.search(reason) else "WRONG"
                self.add(entry, key, outcome, f"{error}; is_exact={H.is_exact} ({reason})")
            elif entry == "layer_hessians":
                self._see_exactness(key, H, expected)
            else:
                self.add(entry, key, "right")

    def entries(self, key: str, joint: bool = False) -> Tensor | None:
        """Where a key's entries stand among all weights, in the order of the weight's memory.

        With ``joint`` every output's bias comes behind its weights, as the last input.
        """
        slices = self.reference.slices
        name = weight_name(key, slices)
        if name is None:
            return None
        entries = torch.arange(slices[name].start, slices[name].stop)
        bias = slices.get(name.removesuffix("weight") + "bias")
        if not joint or bias is None:
            return entries
        column = torch.arange(bias.start, bias.stop)
        if type(self.held.get(key)).__name__ == "Conv1D":
            return torch.cat([entries, column])
        return torch.cat([entries.reshape(len(column), -1), column[:, None]], 1).reshape(-1)

    def _other_order(self, key: str, dense: Tensor, expected: Tensor) -> str | None:
        """What to say of a block that is right but for the order of its entries."""
        module = dict(self.model.named_modules()).get(key)
        if type(module).__name__ != "Conv1D" or dense.shape != expected.shape:
            return None
        order = self._outputs_first(key)
        if self.error(dense, expected[order][:, order]) is not None:
            return None
        return "right, but not in the order of the weight's memory [inputs, outputs]"

    def _outputs_first(self, key: str) -> Tensor:
        """The entries of a weight [inputs, outputs] as the matrix [outputs, inputs] has them."""
        d, m = self.model.get_submodule(key).weight.shape
        return torch.arange(d * m).reshape(d, m).t().reshape(-1)

    def dense(self, H: Any) -> Tensor:
        """Once by products and once at once; they agree, or the answer is not one matrix."""
        dense = H.to_dense()
        eye = torch.eye(dense.shape[0], dtype=dense.dtype)
        products = H @ eye
        if self.error(products, dense.double(), own=dense) is not None:
            raise _Inconsistent("products and to_dense() differ")
        off = abs(H.trace() - float(dense.double().trace()))
        if off > max(1e-8, self._limit) * (abs(H.trace()) + self.reference.scale):
            raise _Inconsistent("trace() and to_dense() differ")
        return dense

    def _see_exactness(self, key: str, H: Any, expected: Tensor) -> None:
        entry = "layer_hessians"
        name = weight_name(key, self.reference.slices)
        assert name is not None
        if self.narrow:
            self.add(entry, key, "right")
            return
        # A random vector shows a difference with probability one.
        vectors = self._vectors(len(expected))
        difference = self._difference(name, expected, vectors, False)
        if not H.is_exact:
            self.verdict.inexact += 1
            self.verdict.needlessly += difference is None
            self.add(entry, key, "right")
        elif difference == _UNKNOWN:
            self.add(entry, key, "unchecked", "no second derivative")
        elif difference is not None:
            self.add(entry, key, "WRONG", f"is_exact=True, but double backward: {difference}")
        elif self.case.program.cuts and (missed := self._difference(name, expected, vectors, True)):
            known = missed != _UNKNOWN
            detail = "is_exact=True, but the model leaves derivatives out" if known else missed
            self.add(entry, key, "WRONG" if known else "unchecked", detail)
        else:
            self.add(entry, key, "right")

    def _vectors(self, size: int) -> Tensor:
        return torch.randn(size, 2, generator=self._random, dtype=torch.float64)

    def _difference(self, name: str, block: Tensor, vectors: Tensor, through: bool) -> str | None:
        """How a block differs from the Hessian, or None."""
        try:
            products = self.reference.hessian_product([name], vectors, through)
        except RuntimeError:
            return _UNKNOWN
        if not bool(torch.isfinite(products).all()):
            return _UNKNOWN
        return self.error(products, block @ vectors, 1e-8)

    def _see_factors(self, factors: Any) -> None:
        self.account("kronecker_factors", list(factors), factors.skipped)
        self.see_layers("kronecker_factors", factors)
        self.factors = factors

    def see_layers(self, entry: str, factors: Any, output: str = "output_hessian") -> None:
        """Factors of every layer; ``output`` names the reference of its E[M]."""
        for key, f in factors.items():
            if weight_name(key, self.reference.slices) is None:
                self.add(entry, key, "WRONG", "a number for a weight that has no such block")
                continue
            right = self.reference.layers.get(key, LayerReference())
            pairs = [
                ("input_covariance", f.input_covariance, right.input_covariance),
                ("output_hessian", f.output_hessian, getattr(right, output)),
            ]
            errors = [
                f"{what}: {error}"
                for what, actual, expected in pairs
                if expected is not None
                and (error := self.error(actual, expected, floor=_FACTOR_FLOOR)) is not None
            ]
            if abs(factors.num_samples - self.reference.count) > (1e-2 if self.narrow else 1e-9):
                errors.append(f"num_samples {factors.num_samples}, not {self.reference.count}")
            if errors:
                self.add(entry, key, "WRONG", "; ".join(errors))
            elif all(expected is not None for _, _, expected in pairs):
                self.add(entry, key, "right")
            else:
                self.add(entry, key, "unchecked", "no reference for uses like these")

    def _see_gauss_newton(self, G: Any) -> None:
        self.account("GaussNewton", list(G.slices), G.skipped)
        self._see_matrix("GaussNewton", G)

    def _see_matrix(self, entry: str, G: Any) -> None:
        keys = list(G.slices)
        entries = [self.entries(key) for key in keys]
        if any(part is None for part in entries):
            self.add(entry, "*", "WRONG", "a number for a model that has no such matrix")
            return
        dense = self.dense(G)
        wrong: dict[str, str] = {}
        for i, key in enumerate(keys):
            part, own = entries[i], dense[G.slices[key], G.slices[key]]
            assert part is not None
            expected = self.reference.gauss_newton[part][:, part]
            if self.error(own, expected) is None:
                continue
            note = self._other_order(key, own, expected)
            if note is not None:
                # Said once; the blocks with others are looked at in the order that is there.
                wrong[key] = note
                entries[i] = part[self._outputs_first(key)]
        order = torch.cat([part for part in entries if part is not None])
        expected = self.reference.gauss_newton[order][:, order]
        if dense.shape != expected.shape:
            self.add(entry, "*", "WRONG", self.error(dense, expected) or "")
            return
        for key in keys:
            for other in keys:
                rows, columns = G.slices[key], G.slices[other]
                error = self.error(dense[rows, columns], expected[rows, columns])
                if error is not None:
                    wrong.setdefault(key, f"in the block with {other!r}: {error}")
        for key in keys:
            self.add(entry, key, "WRONG" if key in wrong else "right", wrong.get(key, ""))

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
            why = "narrow dtype" if self.narrow else "a parameter without a reference"
            self.add(entry, label, "unchecked", why)
            return
        try:
            expected = self.reference.hessian_product(names, vectors)
        except RuntimeError:
            self.add(entry, label, "unchecked", "no second derivative")
            return
        if not bool(torch.isfinite(expected).all()):
            self.add(entry, label, "unchecked", "the second derivative is not finite")
            return
        error = self.error(products, expected, 1e-8)
        self.add(entry, label, "right" if error is None else "WRONG", error or "")

    # Numbers

    def error(
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
        limit = max(tolerance, self._limit)
        difference = float((actual.double() - expected).norm())
        scale = float(expected.norm())
        slack = (limit / 1e-9 if self.narrow else 1.0) * floor * max(self.reference.scale, 1.0)
        if difference <= limit * scale + slack:
            return None
        return f"norm {float(actual.double().norm()):.6g}, not {scale:.6g} (off {difference:.2g})"


def _numbers(entry: str, result: Any) -> list[Tensor]:
    """All numbers of an answer."""
    if entry == "layer_hessians":
        return [H.to_dense().double() for H in result.values()]
    if entry == "kronecker_factors":
        return [
            getattr(f, what).double()
            for f in result.values()
            for what in ("input_covariance", "output_hessian")
        ]
    return [result.to_dense().double()]


class _Inconsistent(Exception):
    """One object gives two answers."""


def _modules_with_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that must be answered for; one whose weight is parametrized instead of the parts."""
    return {
        name: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse="parametrizations" in module._modules), None) is not None
        and ".parametrizations." not in f".{name}."
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


def _reason(name: str, module: nn.Module, skipped: Mapping[str, str] | None) -> str | None:
    for key, reason in (skipped or {}).items():
        if key == name or _inside(key, name, module):
            return str(reason)
    return None


def thrown(error: Exception, model: nn.Module) -> tuple[str, str]:
    """Outcome and detail of an exception: a refusal is one by hesskern that names what it is."""
    frames = traceback.extract_tb(error.__traceback__)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, _Inconsistent):
        return "WRONG", str(error)
    package = Path(hk.__file__).parent
    own = package in Path(frames[-1].filename).parents
    words = r"\b(model|layers?|data|loss|targets?|outputs?|params|inputs?|sample_weight|module)\b"
    if type(error) in (ValueError, TypeError, NotImplementedError) and own:
        names = [name for name, _ in model.named_modules() if name]
        named = any(f"{name!r}" in str(error) for name in names)
        if named or re.search(words, str(error)) or str(error).startswith("factors "):
            return "refused", text[:300]
    place = next((f for f in reversed(frames) if "/hesskern/" in f.filename), frames[-1])
    return "CRASH", f"{text[:200]} (at {place.filename.rsplit('/', 1)[-1]}:{place.lineno})"
