"""A certificate: every quantity that enters the bound, its file, and its verification."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.pacbayes.bound import PriorGrid, bound_rate, draws_rate, kl_inverse
from hesskern.pacbayes.description import rebuild
from hesskern.pacbayes.evaluate import checkpoint_of_draws, counted, draw_error
from hesskern.pacbayes.posterior import LayerPosterior
from hesskern.pacbayes.protocol import Protocol
from hesskern.pacbayes.samples import Samples, collect
from hesskern.pacbayes.slots import Slot, slots_of
from hesskern.parallel.ranks import Ranks, section_of
from hesskern.portable import Portable
from hesskern.progress import Progress, reporter
from hesskern.tensor_files import TensorFormat
from hesskern.zoo import models

__all__ = ["Certificate", "CertificateError", "check_prior", "load_certificate"]

_FILE = TensorFormat("hesskern.certificate/1", "a certificate", "certificate", seals=False)
_ORTHOGONALITY = 1e-8
_AGREEMENT = 1e-9
_TENSORS = ("mean", "prior_mean", "variance", "U", "V")


class CertificateError(ValueError):
    """A certificate that does not hold; the message says what is wrong with it."""


@dataclass(frozen=True, eq=False)
class Certificate(Portable):
    """With probability ``confidence`` the error of the drawn networks is at most ``bound``.

    The probability is over the draw of the n training samples (delta) and of the networks whose
    errors were counted (delta'). The error is that of a network drawn anew from Q for every
    prediction, on samples from the distribution of the training samples.

    Attributes:
        bound: kl^-1(q, rate).
        kl: KL(Q ‖ P), nats, float64.
        q: upper bound on Q's error on the samples, kl^-1(share of errors, log(2 / delta') / draws).
        rate: right-hand side of the bound: KL, the union bound's price and delta over n.
        n: samples the prior has not seen, all of them counted.
        protocol: what was fixed before the data were read.
        errors, draws: wrong predictions in T passes, independent variables among them.
        indices: j of each layer's prior variance.
        layers: Q and P by layer name.
        fixed: all other tensors of the network, the same under P and Q.
        method, settings: how Q was found; nothing of it matters for validity.
        seeds: of the training and of the final draws.
        prior: how w0 was made (``construction``, ``seed``), or who declares it data-free; for a
            data-dependent prior also how many other samples it has seen, and their fingerprint.
        fingerprint: of the samples, see :meth:`hesskern.pacbayes.samples.Samples.fingerprint`.
        architecture: the network, if it is a plain sequence (else None).
        interrupted: whether optimization was stopped before its end.
        seconds: spent on ``optimization`` and on ``draws``.
        test: error on samples that took no part, if there were any: no part of the certificate.
        history: epoch, objective and KL after each epoch.
        versions, created: of the software; UTC.
        digest: SHA-256 of all of the above.
    """

    bound: float
    kl: float
    q: float
    rate: float
    n: int
    protocol: Protocol
    errors: int
    draws: int
    indices: dict[str, int]
    layers: dict[str, LayerPosterior]
    fixed: dict[str, Tensor]
    method: str
    settings: dict[str, Any]
    seeds: dict[str, int]
    prior: dict[str, Any]
    fingerprint: str
    architecture: list[list[Any]] | None
    interrupted: bool
    seconds: dict[str, float]
    versions: dict[str, str]
    created: str
    history: list[dict[str, float]] = field(default_factory=list)
    test: dict[str, Any] | None = None
    digest: str = ""
    model: nn.Module | None = field(default=None, repr=False)

    def _given(self) -> dict[str, Any]:
        return {"model": self.model}

    def _about(self) -> str:
        return "a certificate with its network (save() writes it without)"

    @property
    def confidence(self) -> float:
        """1 - delta - delta'."""
        return self.protocol.confidence

    @property
    def passes(self) -> int:
        """T, passes over the samples for the estimate of the error."""
        return self.protocol.passes

    @property
    def snn_error(self) -> float:
        """Share of wrong predictions of the drawn networks on the training samples."""
        return self.errors / (self.passes * self.n)

    @property
    def prior_variances(self) -> dict[str, float]:
        """lambda of each layer."""
        return {name: self.protocol.grid.variance(j) for name, j in self.indices.items()}

    def __repr__(self) -> str:
        return (
            f"Certificate: error <= {self.bound:.4f} with confidence {self.confidence:.4g} "
            f"(KL {self.kl:.1f}, q {self.q:.5f}, n {self.n}, method {self.method})"
        )

    def header(self) -> dict[str, Any]:
        """Everything but the tensors, ready for JSON."""
        skipped = ("layers", "fixed", "model", "protocol")
        entries = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}
        per_example = {name: layer.per_example for name, layer in self.layers.items()}
        return {
            "format": _FILE.name,
            **entries,
            "protocol": asdict(self.protocol),
            "per_example": per_example,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in the file."""
        found = {f"fixed/{name}": tensor for name, tensor in self.fixed.items()}
        for name, layer in self.layers.items():
            for part in _TENSORS:
                tensor = getattr(layer, part)
                if tensor is not None:
                    found[f"layers/{name}/{part}"] = tensor
        return {name: t.detach().cpu().contiguous() for name, t in sorted(found.items())}

    def sealed(self) -> Certificate:
        """A copy with its :attr:`digest` filled in."""
        return replace(self, digest=self._digest())

    def _digest(self) -> str:
        header = {**self.header(), "digest": ""}
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        for name, tensor in self.tensors().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file: w0, mean, s, U, V, and the rest as JSON in its header.

        The file appears whole or not at all.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        _FILE.write(path, self.tensors(), self.header())

    def content(self) -> bytes:
        """What :meth:`save` writes."""
        return _FILE.packed(self.tensors(), self.header())

    def verify(
        self,
        data: Any = None,
        *,
        model: nn.Module | None = None,
        passes: int | None = None,
        seed: int | None = None,
        progress: bool | Progress = False,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: float = 60.0,
        exact_resume: bool = True,
        group: Any = None,
    ) -> None:
        """Recomputes everything that can be recomputed; returns nothing if the certificate holds.

        Without data: the digest; the protocol's ranges; ‖U^T U - I‖ and ‖V^T V - I‖ (at most 1e-8);
        every j on the grid; KL in float64 from the tensors; the counts, q, the rate and the bound;
        the prior's tensors, drawn again, if its construction is on record.

        With data: also the fingerprint, and the error, drawn again with noise of its own. The
        certificate is refused if the new draws contradict its q at confidence 1 - delta'.

        Args:
            data: the training samples, in any order.
            model: the network, where the file does not describe it.
            passes: passes of the new draws; None: as many as in the certificate.
            seed: of the new draws; None: another one than the certificate's.
            progress: see :func:`hesskern.progress.reporter`.
            checkpoint, checkpoint_every, exact_resume: of the new draws, as in
                :func:`hesskern.kronecker_factors`; every draw counts as a batch.
            group: ranks of torch.distributed that all call this with the same arguments, and count
                a part of the new draws' errors each.

        Raises:
            CertificateError: the certificate does not hold; says why.
            ValueError, TypeError: ``data`` or ``model`` cannot be used.
        """
        if self.digest != self._digest():
            raise CertificateError("digest does not fit: a field or tensor was changed")
        self._verify_layers()
        self._verify_numbers()
        self._verify_prior()
        if data is not None:
            ranks = Ranks.of(group)
            with section_of(ranks, "verifying a certificate"):
                if ranks is not None:
                    facts = {"digest": self.digest, "passes": passes, "seed": seed}
                    ranks.agree("verifying a certificate", facts)
                given = collect(data), model, passes, seed, reporter(progress), ranks
                self._verify_data(*given, (checkpoint, checkpoint_every, exact_resume))

    def _verify_layers(self) -> None:
        if not self.layers or self.layers.keys() != self.indices.keys():
            raise CertificateError(
                f"indices must name the layers {list(self.layers)}, got {list(self.indices)}"
            )
        for name, layer in self.layers.items():
            m, d = layer.mean.shape
            shapes = {"prior_mean": (m, d), "variance": (m, d), "U": (m, m), "V": (d, d)}
            for part, shape in shapes.items():
                tensor = getattr(layer, part)
                if tensor is not None and tuple(tensor.shape) != shape:
                    raise CertificateError(
                        f"layer {name!r}: {part} must be {list(shape)}, got {list(tensor.shape)}"
                    )
            error = layer.orthogonality_error()
            if not error <= _ORTHOGONALITY:
                raise CertificateError(
                    f"layer {name!r}: its basis is not orthogonal, ‖U^T U - I‖ = {error:.2e}"
                )
            if layer.index != self.indices[name]:
                raise CertificateError(f"layer {name!r}: j is on record as two numbers")

    def _verify_numbers(self) -> None:
        try:
            total = sum(
                layer.kl(self.protocol.grid.variance(self.indices[name]))
                for name, layer in self.layers.items()
            )
            rate = rate_of(self.protocol, total, self.n, self.indices)
        except ValueError as error:
            raise CertificateError(str(error)) from error
        trials = self.passes * self.n
        if not (isinstance(self.errors, int) and 0 <= self.errors <= trials):
            raise CertificateError(f"errors must lie in 0..{trials}, got {self.errors}")
        drawn = counted(self.protocol, self.layers, self.errors, self.n)
        if self.draws != drawn.draws:
            raise CertificateError(
                f"draws is {self.draws}, but {self.passes} passes over {self.n} samples make "
                f"{drawn.draws} independent ones"
            )
        q = drawn.upper(self.protocol.delta_draws)
        bound = float(kl_inverse(q, rate))
        for name, found, recomputed in (
            ("kl", self.kl, total),
            ("rate", self.rate, rate),
            ("q", self.q, q),
            ("bound", self.bound, bound),
        ):
            if not math.isclose(found, recomputed, rel_tol=_AGREEMENT, abs_tol=1e-12):
                raise CertificateError(f"{name} is {found!r}, recomputed it is {recomputed!r}")

    def _verify_prior(self) -> None:
        check_prior(self.prior, {name: layer.prior_mean for name, layer in self.layers.items()})

    def _verify_data(
        self,
        samples: Samples,
        model: nn.Module | None,
        passes: int | None,
        seed: int | None,
        progress: Progress,
        ranks: Ranks | None,
        kept: tuple[Any, float, bool],
    ) -> None:
        if len(samples) != self.n:
            raise CertificateError(f"n is {self.n}, but the data hold {len(samples)} samples")
        if samples.fingerprint() != self.fingerprint:
            raise CertificateError("data: these are not the samples of the certificate")
        network, slots = self._network(model, samples)
        protocol = self.protocol if passes is None else replace(self.protocol, passes=passes)
        seed = self.seeds["draws"] + 1 if seed is None else seed
        device = samples.inputs.device
        layers = {name: layer.to(device) for name, layer in self.layers.items()}
        given = network, slots, layers, samples, protocol, seed, progress, "verifying"
        asked = network, layers, samples, protocol, seed, ranks
        saved = checkpoint_of_draws(kept, "Certificate.verify", *asked)
        drawn = draw_error(*given, ranks, saved)
        if saved is not None:
            saved.remove()
        # kl(share ‖ .) also bounds from below: 1 - kl^-1(1 - share, .) <= mean of the variables.
        rate = draws_rate(drawn.draws, protocol.delta_draws)
        lowest = (1 - float(kl_inverse(1 - drawn.share, rate))) / drawn.scale
        if lowest > self.q:
            raise CertificateError(
                f"q is {self.q:.6f}, but {drawn.draws} new draws have an error of "
                f"{drawn.mean:.6f}: with confidence {1 - protocol.delta_draws:.3g} Q's error is at "
                f"least {lowest:.6f}"
            )

    def _network(
        self, model: nn.Module | None, samples: Samples
    ) -> tuple[nn.Module, dict[str, Slot]]:
        if model is None and self.model is not None:
            model = copy.deepcopy(self.model).to(samples.inputs.device)
        if model is None and self.architecture is not None:
            model = rebuild(self.architecture).to(samples.inputs.device, samples.inputs.dtype)
        if model is None:
            raise ValueError("model: the certificate does not describe its network; pass model=")
        own = model.state_dict()
        for name, tensor in self.fixed.items():
            if name not in own or own[name].shape != tensor.shape:
                raise CertificateError(f"model: it has no tensor {name!r} as in the certificate")
            if not torch.equal(own[name].cpu(), tensor.cpu()):
                raise CertificateError(f"model: {name!r} differs from the certificate's")
        slots = slots_of(model, samples.inputs[:2])
        if slots.keys() != self.layers.keys():
            raise CertificateError(
                f"model: its layers are {list(slots)}, the certificate's {list(self.layers)}"
            )
        for name, slot in slots.items():
            layer = self.layers[name]
            if slot.spec.shape != tuple(layer.mean.shape):
                raise CertificateError(
                    f"model: layer {name!r} is {slot.spec.shape}, the certificate's "
                    f"{tuple(layer.mean.shape)}"
                )
            if layer.per_example and not slot.per_example:
                raise CertificateError(
                    f"layer {name!r} cannot be drawn per example: the network shares its weight"
                )
        return model, slots


def check_prior(record: Mapping[str, Any], means: Mapping[str, Tensor]) -> None:
    """Draws w0 again where its construction is on record, and compares.

    Args:
        record: how the prior was made, see :attr:`Certificate.prior`.
        means: w0 [m, d] by layer, the bias as last column.

    Raises:
        CertificateError: the construction cannot be repeated, or gives another w0.
    """
    if record.get("construction") != "hesskern.models.build":
        return
    try:
        model = models.build(
            record["model"], record["input_shape"], record["classes"], record["seed"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CertificateError(f"prior: its construction cannot be repeated ({error})") from None
    state = model.state_dict()
    for name, mean in means.items():
        parts = [state[f"{name}.weight"].flatten(1)] if f"{name}.weight" in state else []
        if parts and f"{name}.bias" in state:
            parts.append(state[f"{name}.bias"][:, None])
        built = torch.cat(parts, 1) if parts else None
        if built is None or built.dtype != mean.dtype or not torch.equal(built, mean.cpu()):
            raise CertificateError(
                f"prior: w0 of layer {name!r} is not what its construction and seed "
                f"{record['seed']} give"
            )


def rate_of(protocol: Protocol, kl: float, n: int, indices: Mapping[str, int]) -> float:
    """The bound's right-hand side for a KL and the layers' j."""
    priced = protocol.priced(list(indices.values()))
    return float(bound_rate(kl, n, priced, protocol.delta, protocol.form, protocol.grid))


def load_certificate(path: str | os.PathLike[str]) -> Certificate:
    """Reads a file written by :meth:`Certificate.save`; :meth:`Certificate.verify` then checks it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a certificate, or is damaged.
    """
    with _FILE.opened(path) as file:
        header = file.header
        tensors = {name: file.tensor(name) for name in file.names}
        protocol = header.pop("protocol")
        protocol["grid"] = PriorGrid(**protocol["grid"])
        per_example = header.pop("per_example")
        layers = {
            name: LayerPosterior(
                per_example[name],
                tensors[f"layers/{name}/mean"],
                tensors[f"layers/{name}/prior_mean"],
                tensors[f"layers/{name}/variance"],
                tensors.get(f"layers/{name}/U"),
                tensors.get(f"layers/{name}/V"),
                index,
            )
            for name, index in header["indices"].items()
        }
        fixed = {n[len("fixed/") :]: t for n, t in tensors.items() if n.startswith("fixed/")}
        return Certificate(protocol=Protocol(**protocol), layers=layers, fixed=fixed, **header)
