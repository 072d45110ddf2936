"""Language models and tokens that the suite ``lm`` runs on, and what torch alone makes of them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesskern.apps.bench.contenders import Call, Contender
from hesskern.apps.bench.settings import Settings

__all__ = [
    "Batch",
    "Pairs",
    "TextCase",
    "as_linear",
    "double",
    "drawn_labels",
    "forward",
    "gpt2",
    "gradient",
    "hooked_factors",
    "hooked_inputs",
    "layers",
    "llama",
    "logits_of",
    "queries",
    "root_loss",
    "sample_losses",
    "without_torchvision",
]

_IGNORED = -100

Batch = dict[str, Tensor]
Pairs = dict[str, tuple[Tensor | None, Tensor]]
"""Per layer, output Hessian [m, m] (None: not compared) and input covariance [d, d]."""


@dataclass(frozen=True)
class TextCase:
    """A causal language model of transformers and batches as its loaders give them.

    Attributes:
        title: for people, sizes included.
        model: native, in eval mode, random weights.
        batches: dicts of input_ids, attention_mask and labels [n, T]; labels are -100 at padding.
    """

    title: str
    model: nn.Module
    batches: list[Batch]

    @property
    def samples(self) -> int:
        return sum(len(batch["labels"]) for batch in self.batches)

    @property
    def tokens(self) -> int:
        """How many are no padding."""
        return int(sum(batch["attention_mask"].sum() for batch in self.batches))


@dataclass(frozen=True)
class _Sizes:
    layers: int = 4
    width: int = 256
    heads: int = 4
    vocabulary: int = 2000
    samples: int = 64
    tokens: int = 128
    batch: int = 8

    @property
    def text(self) -> str:
        return (
            f"{self.layers} layers, {self.width} wide, vocabulary {self.vocabulary:,}, "
            f"{self.samples} x {self.tokens} tokens in batches of {self.batch}"
        )


def _sizes(settings: Settings) -> _Sizes:
    small = _Sizes(layers=1, width=32, vocabulary=50, samples=4, tokens=16, batch=2)
    return small if settings.quick else _Sizes()


@contextmanager
def without_torchvision() -> Iterator[Any]:
    """transformers, while torchvision counts as missing.

    Its builds for PyPI's torch break the import of transformers beside one for the CPU.
    """
    held = sys.modules.pop("torchvision", None)
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    try:
        import transformers

        yield transformers
    finally:
        del sys.modules["torchvision"]
        if held is not None:
            sys.modules["torchvision"] = held


_SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2(settings: Settings, padded: bool = False, full_vocabulary: bool = False) -> TextCase:
    """GPT2LMHeadModel: 4 layers, 256 wide; with padding, about half of the tokens are none.

    With ``full_vocabulary`` its head has as many outputs as GPT-2's, 50,257, instead of 2,000.
    """
    sizes = _sizes(settings)
    if full_vocabulary:
        sizes = replace(sizes, vocabulary=500 if settings.quick else 50_257)
    with without_torchvision() as library:
        config = library.GPT2Config(
            n_layer=sizes.layers,
            n_embd=sizes.width,
            n_head=sizes.heads,
            vocab_size=sizes.vocabulary,
            n_positions=sizes.tokens,
            **_SPECIAL,
        )
        return _case("GPT-2", lambda: library.GPT2LMHeadModel(config), sizes, padded)


def llama(settings: Settings, padded: bool = False) -> TextCase:
    """LlamaForCausalLM: 4 layers, 256 wide, grouped queries."""
    sizes = _sizes(settings)
    with without_torchvision() as library:
        config = library.LlamaConfig(
            num_hidden_layers=sizes.layers,
            hidden_size=sizes.width,
            intermediate_size=sizes.width * 43 // 16,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads // 2,
            vocab_size=sizes.vocabulary,
            max_position_embeddings=sizes.tokens,
            **_SPECIAL,
        )
        return _case("Llama", lambda: library.LlamaForCausalLM(config), sizes, padded)


def _case(name: str, make: Callable[[], nn.Module], sizes: _Sizes, padded: bool) -> TextCase:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    generator = torch.Generator().manual_seed(1)
    n, t = sizes.samples, sizes.tokens
    ids = torch.randint(1, sizes.vocabulary, (n, t), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        # Pairs of samples whose lengths make up one whole sample.
        half = torch.randint(t // 4, 3 * t // 4 + 1, (n // 2,), generator=generator)
        lengths = torch.stack([half, t - half], 1).flatten()
        mask = (torch.arange(t) < lengths[:, None]).long()
    labels = ids.masked_fill(mask == 0, _IGNORED)
    given = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    cut = {key: value.split(sizes.batch) for key, value in given.items()}
    batches = [{key: cut[key][i] for key in cut} for i in range(len(cut["labels"]))]
    title = f"{name}, {sizes.text}{', half of them padding' if padded else ''}"
    return TextCase(title, model, batches)


def queries(case: TextCase, count: int) -> Batch:
    """As long a batch of other samples, of that many, without padding."""
    config: Any = case.model.config
    length = case.batches[0]["labels"].shape[1]
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, config.vocab_size, (count, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def double(case: TextCase) -> TextCase:
    """The same model in float64."""
    return replace(case, model=copy.deepcopy(case.model).double())


def as_linear(case: TextCase) -> TextCase:
    """A copy whose Conv1D layers are nn.Linear, for packages that know no other."""
    from transformers.pytorch_utils import Conv1D

    model = copy.deepcopy(case.model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                d, m = child.weight.shape
                linear = nn.Linear(d, m)
                linear.weight.data.copy_(child.weight.data.T)
                linear.bias.data.copy_(child.bias.data)
                setattr(module, name, linear)
    return replace(case, model=model)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The Linear and Conv1D layers but for a head, which is tied to the embedding in GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name != "lm_head"
    }


def sample_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[N] means of the next tokens' cross-entropy over every sample's labelled tokens."""
    targets = F.pad(labels, (0, 1), value=_IGNORED)[:, 1:]
    each = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED, reduction="none"
    )
    return each.view_as(targets).sum(1) / (targets != _IGNORED).sum(1)


def root_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """sum_n T_n^-1/2 sum_t l_nt, T_n sample n's labelled tokens, whose losses are terms of a sum.

    Outer products of its gradients, summed up, are hesskern's empirical factors: every term gives
    M its own outer product, weighted by 1 / T_n as the mean over a sample's tokens has it.
    """
    terms = (F.pad(labels, (0, 1), value=_IGNORED)[:, 1:] != _IGNORED).sum(1)
    return (sample_losses(logits, labels) * terms.sqrt()).sum()


def drawn_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """[N, T] labels drawn from the logits [N, T, V] where there are some."""
    with torch.no_grad():
        odds = logits.softmax(-1).flatten(0, 1)
        found = torch.multinomial(odds, 1).view_as(labels).roll(1, 1)
    return torch.where(labels == _IGNORED, labels, found)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """[N, T, V]."""
    result = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return result.logits


def gradient(case: TextCase) -> Contender:
    """The unit: loss and gradient of all parameters on the same batches."""

    def prepare() -> Call:
        parameters = list(case.model.parameters())

        def call() -> None:
            for batch in case.batches:
                loss = sample_losses(logits_of(case.model, batch), batch["labels"]).sum()
                torch.autograd.grad(loss, parameters)

        return call

    return Contender("one gradient (loss.backward)", prepare, unit=True)


def forward(case: TextCase) -> None:
    """One forward pass over all batches."""
    with torch.no_grad():
        for batch in case.batches:
            logits_of(case.model, batch)


def _selected(rows: Tensor, mask: Tensor) -> Tensor:
    """[R, k] rows of [n, T, k] at the positions that are no padding."""
    flat = rows.reshape(-1, rows.shape[-1])
    return flat if bool(mask.all()) else flat[mask.flatten().bool()]


class _Hooks:
    """Forward hooks that add X^T X of every distinct input with addmm, and G^T G if asked to.

    Nothing is checked: what a user writes, and the least that it costs.
    """

    def __init__(self, case: TextCase, names: dict[str, nn.Module], outputs: bool) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.mask = case.batches[0]["attention_mask"]
        self._last: list[Any] = [None, None]
        self._wanted = outputs
        self._handles = [
            module.register_forward_hook(self._hook(name)) for name, module in names.items()
        ]

    def _hook(self, name: str) -> Callable[..., None]:
        def take(module: nn.Module, args: Any, result: Any) -> None:
            x = args[0]
            # Layers that share an input have its sum once where factors are not asked for.
            if self._wanted or x is not self._last[0] or name == self._last[1]:
                self._last[:] = x, name
                _add(self.inputs, name, _selected(x.detach(), self.mask))
            if self._wanted:
                result.register_hook(
                    lambda g: _add(self.outputs, name, _selected(g.detach(), self.mask))
                )

        return take

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _add(sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
    if name not in sums:
        sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
    sums[name].addmm_(rows.T, rows)


def hooked_inputs(case: TextCase) -> dict[str, Tensor]:
    """[d, d] sums of X^T X by layer; of layers that share one input only the first has its sum."""
    names = layers(case.model)
    head = getattr(case.model, "lm_head", None)
    hooks = _Hooks(case, names if head is None else {**names, "lm_head": head}, False)
    try:
        with torch.no_grad():
            for batch in case.batches:
                hooks.mask = batch["attention_mask"]
                logits_of(case.model, batch)
    finally:
        hooks.remove()
    return hooks.inputs


def hooked_factors(case: TextCase) -> Pairs:
    """Empirical factors by hooks and addmm, in hesskern's normalization."""
    hooks = _Hooks(case, layers(case.model), True)
    try:
        for batch in case.batches:
            hooks.mask = batch["attention_mask"]
            loss = root_loss(logits_of(case.model, batch), batch["labels"])
            parameters = [p for p in case.model.parameters() if p.requires_grad]
            # The first ones, so that all of the graph is gone through; their gradients alone.
            torch.autograd.grad(loss, parameters[:1])
    finally:
        hooks.remove()
    return {
        name: (hooks.outputs[name] / case.tokens, hooks.inputs[name] / case.samples)
        for name in hooks.inputs
    }
