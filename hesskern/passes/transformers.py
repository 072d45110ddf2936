"""Losses of ``transformers``: they take its batches apart, shift and mask labels as it does.

A batch is a dict (or BatchEncoding) of tensors with the labels inside, as a loader of transformers
gives it. The labels go to the loss, the rest to the model as ``model(**inputs)``; its logits are
read. The positions of ``attention_mask`` [N, T] that are zero are no data; labels of -100 only drop
terms of the loss.

With l_nt the cross-entropy of position t of sample n, n's loss is the mean of l_nt over the T_n
positions that have a label. ``reduction="token"`` weights sample n by T_n: the loss of the data is
then the mean of l_nt over all labelled tokens, which is transformers' own where the data is one
batch (or ``num_items_in_batch`` counts the tokens of all), however the data is cut into batches.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesskern import ops
from hesskern.choices import check_choice
from hesskern.devices import on_host, sent
from hesskern.passes.batches import Batch, Parts, pair, samples_of, shape_is_ambiguous
from hesskern.passes.checks import Checks, check_dense
from hesskern.passes.draws import SampleDraws, without_padding
from hesskern.passes.forward_pass import checked_outputs, run_model
from hesskern.passes.losses import Loss, Rows, Unread, resolve_loss
from hesskern.passes.own_loss import check_alignment

__all__ = [
    "CausalLM",
    "ImageClassification",
    "MaskedLM",
    "Seq2SeqLM",
    "SequenceClassification",
    "TokenClassification",
]

Call = Literal["keywords", "dict"]
Reduction = Literal["mean", "token"]
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

_LABELS = "labels"
# Labels that have no term in the loss.
_IGNORED = -100
# Models (config.model_type) with a language model's head whose own loss does not shift labels, and
# may be more than one cross-entropy. That of others is compared as it runs.
_AT_THEIR_POSITIONS = frozenset({"xlnet", "xlm", "flaubert", "prophetnet"})
# Arguments that are another way to say what the labels weigh.
_COUNTS = "num_items_in_batch"

_CROSS_ENTROPY = resolve_loss(nn.CrossEntropyLoss())
_LOSSES: dict[str, Loss] = {
    "regression": resolve_loss(nn.MSELoss()),
    "single_label_classification": _CROSS_ENTROPY,
    "multi_label_classification": resolve_loss(nn.BCEWithLogitsLoss()),
}


@dataclass(frozen=True, kw_only=True)
class _TransformersLoss(Loss):
    """What the losses have in common: how a batch is taken apart and the model is called."""

    call: Call = "keywords"
    split: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        check_choice("call", self.call, Call)
        if self.split is not None and not callable(self.split):
            raise TypeError(f"split must be callable, got {type(self.split).__name__}")

    @property
    def _name(self) -> str:
        return type(self).__name__

    def split_batch(self, element: Any, index: int) -> Parts:
        if self.split is not None:
            element = self.split(element)
            if not isinstance(element, (tuple, list)) or len(element) not in (2, 3):
                raise TypeError(
                    "split must return (inputs, targets) or (inputs, targets, weight), got "
                    f"{type(element).__name__} for batch {index}"
                )
        weight: Any = None
        if isinstance(element, Mapping):
            inputs: Any = dict(element)
            labels = inputs.pop(_LABELS, None)
            if labels is None:
                raise ValueError(
                    f"batch {index} has no 'labels', which {self._name} takes; it has "
                    f"{', '.join(map(repr, inputs)) or 'nothing'}. {self._how_to_label}"
                )
        elif isinstance(element, (tuple, list)):
            inputs, labels, weight, *_ = pair(element, index)
        else:
            raise TypeError(
                f"data must yield dicts with 'labels' or (inputs, labels) for {self._name}; batch "
                f"{index} is {type(element).__name__}. split=callable(batch) -> (inputs, targets) "
                "takes others apart"
            )
        if isinstance(inputs, Mapping):
            for key, value in inputs.items():
                _check_no_list(value, key, index)
        _check_no_list(labels, _LABELS, index)
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"'labels' of batch {index} must be a tensor, got {type(labels).__name__}"
            )
        check_dense(labels, f"'labels' of batch {index}")
        targets = self._targets(labels, index)
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        check = None if mask is None else partial(_check_mask, inputs, index)
        of_data = partial(self._of_data, inputs)
        return Parts(self._kept(inputs, labels), targets, weight, mask, check, of_data)

    _how_to_label = "split=callable(batch) -> (inputs, targets) takes labels of another name"

    @abstractmethod
    def _targets(self, labels: Tensor, index: int) -> Tensor:
        """The targets that the labels of a batch stand for."""

    def _of_data(self, inputs: Any, targets: Any, mask: Any) -> Any:
        """The targets without those of padding, and those that no position of the data predicts."""
        return targets

    def _kept(self, inputs: Any, labels: Tensor) -> Any:
        """The inputs of a batch, from which :meth:`run` makes those of the model."""
        return inputs

    def run(self, model: nn.Module, inputs: Any) -> Tensor:
        return self._logits(model, inputs)

    def _called(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """What the model returns, called as it is to be."""
        return model(inputs) if self.call == "dict" else model(**inputs)

    def _logits(self, model: nn.Module, inputs: Any) -> Tensor:
        """[N, ...] of the model, called as it is to be."""
        if not isinstance(inputs, Mapping):
            return run_model(model, inputs)
        result = self._called(model, inputs)
        if isinstance(result, tuple) and result and not hasattr(result, "logits"):
            # Of return_dict=False, without a loss in front.
            result = result[0]
        return checked_outputs(result)


def _check_mask(inputs: Mapping[str, Any], index: int) -> None:
    """Raises ValueError if the attention mask does not say [N, T] which positions are data."""
    mask = inputs["attention_mask"]
    ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
    expected = list(ids.shape[:2]) if isinstance(ids, Tensor) else None
    found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if not isinstance(mask, Tensor) or mask.dim() != 2 or expected not in (None, found):
        raise ValueError(
            f"attention_mask of batch {index} must be [N, T]"
            f"{'' if expected is None else f' = {expected}'}, got {found}; position_mask=function "
            "gives the mask of a model that takes others"
        )


def _check_no_list(value: Any, key: str, index: int) -> None:
    if isinstance(value, (list, tuple)) and not any(isinstance(v, Tensor) for v in value):
        raise TypeError(
            f"{key!r} of batch {index} is a {type(value).__name__}, not a tensor: let the "
            "tokenizer or the collator return tensors (return_tensors='pt', with padding where "
            "the lengths differ)"
        )


@dataclass(frozen=True, kw_only=True)
class _TokenLoss(_TransformersLoss):
    """Cross-entropy of logits [N, T, V] at labels [N, T], the classes in the last axis."""

    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reduction", self.reduction, Reduction)

    @property
    def weighs(self) -> bool:  # type: ignore[override]
        return self.reduction == "token"

    def _targets(self, labels: Tensor, index: int) -> Tensor:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(
                f"'labels' of batch {index} must be integers [N, T] for {self._name}, got "
                f"{labels.dtype}"
            )
        if labels.dim() != 2:
            raise ValueError(
                f"'labels' of batch {index} must be [N, T] for {self._name}, got "
                f"{list(labels.shape)}"
            )
        return labels.long()

    def _of_data(self, inputs: Any, targets: Any, mask: Any) -> Any:
        if not isinstance(mask, Tensor) or mask.shape != targets.shape:
            return targets
        return targets.masked_fill(mask.to(targets.device) == 0, _IGNORED)

    def check(self, outputs: Tensor, targets: Any, checks: Checks) -> Any:
        if outputs.dim() != 3:
            raise ValueError(
                f"logits must be [N, T, V] for {self._name}, got {list(outputs.shape)}"
            )
        if targets.shape != outputs.shape[:2]:
            raise ValueError(
                f"'labels' must be [N, T] = {list(outputs.shape[:2])} as the logits "
                f"{list(outputs.shape)} have it, got {list(targets.shape)}"
            )
        if targets.numel():
            classes = outputs.shape[2]
            least, most = (
                targets.masked_fill(targets == _IGNORED, 0).flatten().aminmax(dim=0, keepdim=True)
            )
            checks.require(
                (least >= 0) & (most < classes),
                lambda least, most: (
                    f"'labels' must lie in [0, {classes}), the size of the model's head, or be "
                    f"{_IGNORED}; found {least if least < 0 else most:.0f}"
                ),
                least,
                most,
            )
        return targets

    def compare(self, model: nn.Module, batch: Batch, outputs: Tensor, checks: Checks) -> bool:
        if not isinstance(batch.inputs, Mapping) or _configured(model, "model_type") is None:
            return True
        if not len(outputs) or outputs.shape[1] < 2:
            # One position has no neighbour to be told from.
            return False
        if shape_is_ambiguous(batch, len(outputs)):
            # Nothing can be cut from it.
            return False
        chosen = _longest(batch)
        one = samples_of(batch, slice(chosen, chosen + 1))
        given = dict(self._given(model, one.inputs))
        given.pop(_COUNTS, None)
        here, there = ("shifts labels", "takes them at their positions")
        if not self._shifts:
            here, there = ("takes labels at their positions", "shifts them")

        def message(own: float, ours: float) -> str:
            return (
                f"{self._name} {here}, but the model's own loss {there}: for one label of batch "
                f"{batch.index} that is {own:.6g}, {self._name}'s would be {ours:.6g}; "
                f"{self._instead}"
            )

        def run(labels: Tensor) -> Any:
            return self._called(model, {**given, _LABELS: labels})

        return check_alignment(model, run, outputs[chosen], self._shifts, message, checks)

    # Whether the logits of position t are compared with the label of t + 1.
    _shifts = False
    _instead = "pass hk.CausalLM(), which shifts them too"

    def _given(self, model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The model's arguments, without labels."""
        return inputs

    def counted(self, outputs: Tensor, targets: Any) -> Tensor | None:
        labelled = targets != _IGNORED
        if self.weighs:
            return labelled.sum(1)
        counted = labelled.any(1)
        # A mask of ones alone would have every input multiplied by it.
        return None if on_host(counted) and bool(counted.all()) else counted

    def _terms(self, outputs: Tensor, targets: Any) -> Tensor | None:
        return self._labelled(targets)

    @staticmethod
    def _labelled(targets: Tensor) -> Tensor:
        """[N] labelled tokens per sample; 1 where there are none."""
        return (targets != _IGNORED).sum(1).clamp(min=1)

    def exact(self, outputs: Tensor, targets: Any) -> Rows:
        rows = _CROSS_ENTROPY.exact(outputs.transpose(1, 2), targets)
        return Rows(rows.count, lambda j: rows.row(j).transpose(1, 2))

    def sampled(self, outputs: Tensor, targets: Any, samples: int, draws: SampleDraws) -> Rows:
        n, tokens, classes = outputs.shape
        # Tokens as samples of their own: each has its logits in one piece.
        logits = outputs.detach().reshape(n * tokens, classes)
        each = self._labelled(targets).unsqueeze(1).expand(n, tokens).reshape(-1)
        labels = targets.reshape(-1)
        # Drawn on the host, and therefore the same on every device.
        uniform = draws.uniform(samples, tokens)
        uniform = without_padding(sent(uniform, outputs.device), targets != _IGNORED)

        def row(index: int) -> Tensor:
            return ops.sampled_cross_entropy_gradient(
                logits, uniform[:, index], labels, _IGNORED, each, samples**-0.5
            ).view(n, tokens, classes)

        return Rows(samples, row)

    def unread(self, outputs: Tensor, targets: Any) -> Unread | None:
        return Unread(targets == _IGNORED, 2)

    def per_sample(self, outputs: Tensor, targets: Any) -> Tensor:
        n, tokens, classes = outputs.shape
        labels = targets.reshape(-1)
        if not on_host(targets):
            # None of them stops a device for good; the checks report them.
            labels = labels.clamp(0, max(classes - 1, 0)).where(labels != _IGNORED, labels)
        losses = F.cross_entropy(
            outputs.reshape(n * tokens, classes), labels, reduction="none", ignore_index=_IGNORED
        ).reshape(n, tokens)
        return losses.sum(1) / self._labelled(targets)


@dataclass(frozen=True, kw_only=True)
class CausalLM(_TokenLoss):
    """Next-token cross-entropy of a decoder: GPT-2, Llama and other ``AutoModelForCausalLM``.

    The label of position t + 1 is the target of position t; the last position has none. What
    padding would predict is no target, nor is padding itself, whether ``attention_mask`` or
    ``position_mask`` says that it is padding: with padding on the left the first token has none
    before it, as in the sample alone.

    >>> factors = hk.kronecker_factors(model, loader, hk.CausalLM(), output="mc")

    Args:
        reduction: "mean": a sample's loss is the mean over its labelled tokens. "token": samples
            are weighted by their numbers of labelled tokens, so that the loss of the data is the
            mean over all labelled tokens, as transformers has it for one batch; all means over
            samples (factors, Hessians) become weighted means, and ``num_samples`` counts tokens.
        call: "keywords": ``model(**inputs)``; "dict": ``model(inputs)``.
        split: for loaders of other batches: ``split(batch) -> (inputs, targets)``, or with weights
            [N] of the samples as a third. Targets are labels [N, T], not yet shifted.

    Raises:
        TypeError: ``split`` is not callable. In a pass: the batch is no dict of tensors, or labels
            are no integers.
        ValueError: an unknown ``reduction`` or ``call``. In a pass: the batch has no labels, or
            they do not fit the logits [N, T, V]; the attention mask is not [N, T] and no
            ``position_mask`` gives another; the model is an encoder-decoder, or one whose own loss
            does not shift labels (XLNet, ``BartForCausalLM``).
    """

    _shifts = True
    _instead = "pass hk.MaskedLM(), which does so too"
    _how_to_label = (
        "For a language model's own text, labels = input_ids.masked_fill(attention_mask == 0, "
        "-100), or DataCollatorForLanguageModeling(tokenizer, mlm=False)"
    )

    def _targets(self, labels: Tensor, index: int) -> Tensor:
        labels = super()._targets(labels, index)
        return F.pad(labels, (0, 1), value=_IGNORED)[:, 1:]

    def _of_data(self, inputs: Any, targets: Any, mask: Any) -> Any:
        targets = super()._of_data(inputs, targets, mask)
        if isinstance(mask, Tensor) and mask.shape == targets.shape:
            # The label of position t + 1 is of padding where that position is.
            mask = F.pad(mask, (0, 1), value=1)[:, 1:]
        return super()._of_data(inputs, targets, mask)

    def run(self, model: nn.Module, inputs: Any) -> Tensor:
        kind = _configured(model, "model_type")
        if kind in _AT_THEIR_POSITIONS:
            raise ValueError(
                f"CausalLM shifts labels, but the loss of {kind!r} models takes them at their "
                "positions; pass hk.MaskedLM(), which does so too"
            )
        if _configured(model, "is_encoder_decoder"):
            raise ValueError(
                "CausalLM shifts labels, but the model is an encoder-decoder, whose labels stand "
                "at their positions; pass hk.Seq2SeqLM()"
            )
        return super().run(model, inputs)


@dataclass(frozen=True, kw_only=True)
class MaskedLM(_TokenLoss):
    """Cross-entropy at masked tokens: BERT and other ``AutoModelForMaskedLM``.

    Labels [N, T] stand at their positions; those of tokens that are not masked are -100, and those
    of padding count as if they were.

    Args:
        reduction, call, split: as in :class:`CausalLM`.

    Raises:
        TypeError, ValueError: as :class:`CausalLM`.
    """

    _how_to_label = "DataCollatorForLanguageModeling(tokenizer, mlm=True) makes them"


@dataclass(frozen=True, kw_only=True)
class TokenClassification(_TokenLoss):
    """Cross-entropy of a class for every token: ``AutoModelForTokenClassification``.

    Labels [N, T] stand at their positions; tokens without one have -100. Labels of padding count as
    if they were -100.

    Args:
        reduction, call, split: as in :class:`CausalLM`.

    Raises:
        TypeError, ValueError: as :class:`CausalLM`.
    """


@dataclass(frozen=True, kw_only=True)
class Seq2SeqLM(_TokenLoss):
    """Cross-entropy of an encoder-decoder: T5, BART and other ``AutoModelForSeq2SeqLM``.

    Labels [N, T] are the decoder's tokens, at their positions. Where the batch has no
    ``decoder_input_ids``, the model makes them of the labels
    (``prepare_decoder_input_ids_from_labels``), as it does in training. ``attention_mask`` says
    which positions of the encoder are data, ``decoder_attention_mask`` which of the decoder; labels
    elsewhere count as if they were -100.

    Args:
        reduction, call, split: as in :class:`CausalLM`.

    Raises:
        TypeError, ValueError: as :class:`CausalLM`.
    """

    def _of_data(self, inputs: Any, targets: Any, mask: Any) -> Any:
        # The mask that is given is the encoder's.
        own = inputs.get("decoder_attention_mask") if isinstance(inputs, Mapping) else None
        return super()._of_data(inputs, targets, own)

    def _kept(self, inputs: Any, labels: Tensor) -> Any:
        if not isinstance(inputs, Mapping):
            raise TypeError(
                f"inputs must be a dict of arguments for Seq2SeqLM, got {type(inputs).__name__}"
            )
        return {**inputs, _LABELS: labels}

    _instead = (
        "let split= give the 'decoder_input_ids' that the model makes of the labels, and the "
        "labels moved by one position to the left"
    )

    def compare(self, model: nn.Module, batch: Batch, outputs: Tensor, checks: Checks) -> bool:
        # With split= the labels are where the caller has put them.
        return self.split is not None or super().compare(model, batch, outputs, checks)

    def run(self, model: nn.Module, inputs: Any) -> Tensor:
        return self._logits(model, self._given(model, inputs))

    def _given(self, model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        given = dict(inputs)
        labels = given.pop(_LABELS)
        if given.get("decoder_input_ids") is None and given.get("decoder_inputs_embeds") is None:
            make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
            if make is None:
                raise ValueError(
                    "the batch has no 'decoder_input_ids', and the model has no method "
                    "prepare_decoder_input_ids_from_labels that makes them of the labels"
                )
            given["decoder_input_ids"] = make(labels=labels)
        return given


@dataclass(frozen=True, kw_only=True)
class SequenceClassification(_TransformersLoss):
    """One prediction per sample: ``AutoModelForSequenceClassification``, images, sounds, videos.

    Logits [N, C]. As transformers has it, the problem is

    - "regression": squared error at labels [N, C] (or [N] for C = 1), the mean over C;
    - "single_label_classification": cross-entropy at labels [N];
    - "multi_label_classification": binary cross-entropy at labels [N, C] in [0, 1], the mean over
      C.

    Args:
        problem_type: one of these; None: regression where C = 1, a single label where labels are
            integers, else several labels. A model whose ``config.problem_type`` says otherwise is
            refused.
        call, split: as in :class:`CausalLM`.

    Raises:
        TypeError, ValueError: as :class:`CausalLM`; the model's configuration has another problem
            type.
    """

    problem_type: ProblemType | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.problem_type is not None:
            check_choice("problem_type", self.problem_type, ProblemType)

    def _targets(self, labels: Tensor, index: int) -> Tensor:
        if labels.is_complex():
            raise TypeError(f"'labels' of batch {index} must be real, got {labels.dtype}")
        return labels

    def _kept(self, inputs: Any, labels: Tensor) -> Any:
        # What kind of a problem it is depends on labels and model.
        return {**inputs, _LABELS: labels} if isinstance(inputs, Mapping) else inputs

    def run(self, model: nn.Module, inputs: Any) -> Tensor:
        if not isinstance(inputs, Mapping):
            return super().run(model, inputs)
        given = dict(inputs)
        labels = given.pop(_LABELS)
        logits = self._logits(model, given)
        configured = _configured(model, "problem_type")
        if self.problem_type is None and configured is not None and logits.dim() == 2:
            found = self._problem(logits, labels)
            if found != configured:
                raise ValueError(
                    f"model.config.problem_type is {configured!r}, but logits "
                    f"{list(logits.shape)} and 'labels' of {labels.dtype} are those of {found!r}; "
                    f"pass hk.SequenceClassification(problem_type={configured!r}) or the other"
                )
        return logits

    def _problem(self, outputs: Tensor, targets: Tensor) -> str:
        if self.problem_type is not None:
            return self.problem_type
        if outputs.shape[1] == 1:
            return "regression"
        whole = not targets.is_floating_point() and targets.dtype != torch.bool
        return "single_label_classification" if whole else "multi_label_classification"

    def _torch(self, outputs: Tensor, targets: Tensor) -> tuple[Loss, Tensor]:
        """The loss of torch that it is, and the targets as that takes them."""
        problem = self._problem(outputs, targets)
        if problem == "single_label_classification":
            return _LOSSES[problem], targets.reshape(len(targets)).long()
        return _LOSSES[problem], targets.reshape(outputs.shape).to(outputs.dtype)

    def check(self, outputs: Tensor, targets: Any, checks: Checks) -> Any:
        if outputs.dim() != 2:
            raise ValueError(f"logits must be [N, C] for {self._name}, got {list(outputs.shape)}")
        problem, shape = self._problem(outputs, targets), list(targets.shape)
        n, classes = outputs.shape
        single = problem == "single_label_classification"
        allowed = [[n], [n, 1]] if single or classes == 1 else [[n, classes]]
        if shape not in allowed:
            raise ValueError(
                f"'labels' must be {' or '.join(map(str, allowed))} for {problem!r} with logits "
                f"{list(outputs.shape)}, got {shape}"
            )
        if single and (targets.is_floating_point() or targets.dtype == torch.bool):
            raise TypeError(f"'labels' must be integers for {problem!r}, got {targets.dtype}")
        loss, made = self._torch(outputs, targets)
        loss.check(outputs, made, checks)
        return targets

    def counted(self, outputs: Tensor, targets: Any) -> Tensor | None:
        loss, made = self._torch(outputs, targets)
        return loss.counted(outputs, made)

    def exact(self, outputs: Tensor, targets: Any) -> Rows:
        loss, made = self._torch(outputs, targets)
        return loss.exact(outputs, made)

    def sampled(self, outputs: Tensor, targets: Any, samples: int, draws: SampleDraws) -> Rows:
        loss, made = self._torch(outputs, targets)
        return loss.sampled(outputs, made, samples, draws)

    def empirical(self, outputs: Tensor, targets: Any) -> Rows:
        loss, made = self._torch(outputs, targets)
        return loss.empirical(outputs, made)

    def per_sample(self, outputs: Tensor, targets: Any) -> Tensor:
        loss, made = self._torch(outputs, targets)
        return loss.per_sample(outputs, made)


ImageClassification = SequenceClassification


def _longest(batch: Batch) -> int:
    """A sample that is not all padding, where the host can tell."""
    mask = batch.mask
    if isinstance(mask, Tensor) and mask.dim() == 2 and on_host(mask) and mask.numel():
        return int((mask != 0).sum(1).argmax())
    return 0


def _configured(model: nn.Module, name: str) -> Any:
    """What the model's configuration says, or that of the model in a wrapper; None: nothing."""
    for module in model.modules():
        config = getattr(module, "config", None)
        # The outermost counts: parts of a model may be configured otherwise. That of a wrapper that
        # is none of transformers says nothing.
        if hasattr(config, "model_type") or hasattr(config, name):
            return getattr(config, name, None)
    return None
