"""Rules of the grammar: what hesskern may refuse, and must not take for something else."""

from __future__ import annotations

from fuzz.builder import Builder, Linear, Rejected, Value, production
from fuzz.layers import applied, make_linear

ROWS = "vs12"
"""Layouts with the samples in axis 0."""


def _rows(b: Builder, h: Value) -> str:
    return ", None" * (len(b.shape(h)) - 1)


@production(ROWS, 1.0, strange=True)
def coupled_rows(b: Builder, h: Value) -> Value:
    forms = [
        "{0} - {0}.mean(0)",
        "{0} - {0}.mean(0, keepdim=True)",
        "{0} + 0.5 * {0}.roll(1, 0)",
        "{0}.softmax(0)",
        "{0}.cumsum(0)",
        "{0} * {0}.sum(0).sigmoid()",
        "{0} / (1 + {0}.std(0, unbiased=False))",
        "F.batch_norm({0}, None, None, training=True)",
        "{0} * {0}.amax(0)",
        "{0} + {0}.flip(0)",
        "torch.where({0} > {0}.mean(0), {0}, {0} * 0.2)",
        "{0} * ({0}.mean() > 0)",
    ]
    if h.layout in "vs":
        forms += [
            "torch.einsum('nm,m...->n...', torch.ones(len({0}), len({0})).tril().to({0}), {0})"
            " / len({0})",
            "(({0}.flatten(1) @ {0}.flatten(1).t()).softmax(-1) @ {0}.flatten(1))"
            ".reshape({0}.shape)",
        ]
    return b.value(b.pick(forms).format(h.name), h.layout)


@production(ROWS, 0.6, strange=True)
def detached_batch_statistics(b: Builder, h: Value) -> Value:
    forms = (
        "{0} - cut({0}.mean(0))",
        "{0} / (1 + cut({0}.std(0, unbiased=False)))",
        "{0} / (1 + number({0}.abs().mean()))",
        "{0} * cut({0}.mean(0, keepdim=True))",
    )
    return b.value(b.pick(forms).format(h.name), h.layout)


@production(ROWS, 0.6, strange=True)
def rows_moved(b: Builder, h: Value) -> Value:
    """Another order of the samples, mostly undone after a layer."""
    moved = b.value(b.pick((f"{h.name}.flip(0)", f"{h.name}.roll(1, 0)")), h.layout)
    back = "flip(0)" if "flip" in b.program.body[-1] else "roll(-1, 0)"
    if h.layout in "vs":
        layer = make_linear(b, b.shape(h)[-1], b.width())
        moved = b.value(applied(b, layer, moved.name, len(b.shape(h))), h.layout)
    else:
        moved = b.value(f"{moved.name}.relu()", h.layout)
    if b.chance(0.3):
        b.feature("rows not moved back", strange=True)
        return moved
    return b.value(f"{moved.name}.{back}", h.layout)


@production("v", 0.5, strange=True)
def rows_twice(b: Builder, h: Value) -> Value:
    """A batch of two views of every sample."""
    name = h.name
    both = b.value(f"torch.cat([{name}, {name}.tanh()], 0)", "v")
    layer = make_linear(b, b.shape(h)[-1], b.width())
    both = b.value(applied(b, layer, both.name, 2), "v")
    n = f"len({name})"
    form = b.pick(("{0}[:{1}] + {0}[{1}:]", "{0}[:{1}] * {0}[{1}:].sigmoid()", "{0}[{1}:]"))
    return b.value(form.format(both.name, n), "v")


@production(ROWS, 0.5, strange=True)
def dropout_always_on(b: Builder, h: Value) -> Value:
    b.program.random = True
    forms = ("F.dropout({0}, 0.5)", "{0} + torch.randn_like({0})", "{0} * torch.rand(()).item()")
    return b.value(b.pick(forms).format(h.name), h.layout)


@production("vs", 1.2, strange=True)
def inner_derivative(b: Builder, h: Value) -> Value:
    d, m = b.shape(h)[-1], b.width()
    first = make_linear(b, d, m, "module")
    b.program.odd.add(first.name)
    act = b.pick(("tanh()", "sigmoid()", "square()", "relu()", "sin()"))
    t = f"self.{first.name}(t).{act}"
    if b.chance(0.5):
        second = make_linear(b, m, 1, "module")
        b.program.odd.add(second.name)
        t = f"self.{second.name}({t})"
    result = b.value(f"derivative(lambda t: {t}, {h.name})", h.layout)
    return b.value(f"{h.name} + {result.name}", h.layout) if b.chance(0.4) else result


@production("vs", 1.2, strange=True)
def checkpointed(b: Builder, h: Value) -> Value:
    layer = make_linear(b, b.shape(h)[-1], b.width(), "module")
    reentrant = b.chance(0.5)
    b.feature("re-entrant" if reentrant else "not re-entrant")
    inner = applied(b, layer, "t", 0, 0)
    act = b.pick(("", ".tanh()", ".relu()", ".square()"))
    call = f"lambda t: {inner}{act}" if b.chance(0.7) or act else f"self.{layer.name}"
    if "lambda" not in call:
        b.program.odd.add(layer.name)
    return b.value(f"checkpoint({call}, {h.name}, use_reentrant={reentrant})", h.layout)


def _first_layer(b: Builder, h: Value) -> tuple[Linear, Value]:
    """A layer that keeps the width, applied."""
    d = b.shape(h)[-1]
    layer = make_linear(b, d, d, "module")
    value = b.value(f"{applied(b, layer, h.name, len(b.shape(h)), 0)}.tanh()", h.layout)
    return layer, value


@production("vs", 1.2, strange=True)
def weight_used_elsewhere(b: Builder, h: Value) -> Value:
    d = b.shape(h)[-1]
    known = [x for x in b.linears if x.kind == "module" and d in (x.inputs, x.outputs)]
    if known:
        layer = b.pick(known)
    else:
        layer, h = _first_layer(b, h)
    W, x = f"self.{layer.name}.weight", h.name
    forms = []
    if layer.outputs == d:
        forms += [
            f"F.linear({x}, {W}.t())",
            f"{x} @ {W}",
            f"torch.einsum('...o,oi->...i', {x}, {W})",
        ]
    if layer.inputs == d and layer.outputs == d:
        forms += [f"{x} @ ({W} @ {W})", f"{x} * {W}.diagonal()"]
    if layer.inputs == d:
        forms += [f"{x} * {W}.norm()", f"{x} + {W}.sum(0)", f"{x} * {W}[0]", f"{x} - {W}.mean()"]
        forms += [f"F.linear({x}, 2 * {W})", f"F.linear({x}, {W}.tanh())"]
        forms += [f"F.linear({x}, {W}[:1])", f"F.linear({x}, cut({W}))", f"F.linear({x}, {W} * 1)"]
        forms += [f"F.linear({x}, {W}.reshape(-1, {d}))", f"F.linear({x}, {W}.clone())"]
        L = f"self.{layer.name}"
        forms += [f"torch.func.functional_call({L}, dict({L}.named_parameters()), ({x},))"]
        forms += [f"F.linear({x}, F.normalize({W}, dim=1))"]
    b.program.odd.add(layer.name)
    return b.value(b.pick(forms), h.layout)


@production("vs12", 1.2)
def weight_looked_at(b: Builder, h: Value) -> Value:
    """Uses of a weight that no derivative passes through."""
    if not b.linears:
        raise Rejected("no layer")
    W, x = f"self.{b.pick(b.linears).name}.weight", h.name
    forms = (
        f"{x}.to({W})",
        f"{x}.type_as({W})",
        f"{x} + {W}.new_zeros(())",
        f"{x} + torch.zeros_like({W}).sum()",
        f"{x}.to({W}.dtype)",
        f"{x} * {W}.shape[0]",
        f"{x} + {W}.new_ones(1)",
        f"{x}.to({W}.device, {W}.dtype)",
        f"{x} * float({W}.dim())",
        f"{x} + torch.ones_like({W})[0, 0]",
    )
    return b.value(b.pick(forms), h.layout)


@production("vs", 0.8, strange=True)
def tied(b: Builder, h: Value) -> Value:
    """A second layer with the weight of a first."""
    d = b.shape(h)[-1]
    known = [x for x in b.linears if x.inputs == d and x.kind == "module"]
    if known:
        first = b.pick(known)
    else:
        first, h = _first_layer(b, h)
    layer = make_linear(b, d, first.outputs, "module")
    b.setup(f"self.{layer.name}.weight = self.{first.name}.weight")
    return b.value(applied(b, layer, h.name, len(b.shape(h))), h.layout)


@production("vs", 1, strange=True)
def without_gradients(b: Builder, h: Value) -> Value:
    d = b.shape(h)[-1]
    layer = make_linear(b, d, d, "module")
    gate = b.name("h")
    b.line(f"with no_grad():\n    {gate} = {applied(b, layer, h.name, 0, 0)}.sigmoid()")
    return b.value(f"{h.name} * {gate}", h.layout)


@production("vs12", 0.8, strange=True)
def custom_function(b: Builder, h: Value) -> Value:
    return b.value(f"{b.pick(('Reversed', 'Cubed'))}.apply({h.name})", h.layout)


@production("vs", 1.2, strange=True)
def route(b: Builder, h: Value) -> Value:
    """Layers that only some batches reach."""
    d, m = b.shape(h)[-1], b.width()
    one, two = make_linear(b, d, m, "module"), make_linear(b, d, m, "module")
    x = h.name
    condition = b.pick((f"len({x}) > 2", f"len({x}) % 2", f"{x}.sum() > 0", f"{x}[0].sum() > 0"))
    left, right = (applied(b, layer, x, len(b.shape(h)), 0) for layer in (one, two))
    if b.chance(0.3) and d == m:
        right = x
    return b.value(f"({left}) if {condition} else ({right})", h.layout)


@production("vs12", 0.8)
def never_reached(b: Builder, h: Value) -> Value:
    make_linear(b, b.width(), b.width(), "module")
    return h


@production("vs", 0.6, strange=True)
def reached_without_effect(b: Builder, h: Value) -> Value:
    layer = make_linear(b, b.shape(h)[-1], b.width(), "module")
    lost = b.value(applied(b, layer, h.name, len(b.shape(h)), 0), h.layout)
    return b.value(f"{h.name} + 0 * {lost.name}.sum()", h.layout) if b.chance(0.3) else h


@production("v", 0.5, strange=True)
def complex_layer(b: Builder, h: Value) -> Value:
    d = b.shape(h)[1]
    name = b.module("z", f"nn.Linear({d}, {b.width()}, dtype=torch.cdouble)")
    b.program.odd.add(name)
    return b.value(f"self.{name}({h.name}.to(torch.cdouble)).abs()", "v")


@production("vs", 0.4, strange=True)
def float32_inside(b: Builder, h: Value) -> Value:
    name = b.module("l", f"nn.Linear({b.shape(h)[-1]}, {b.width()})")
    b.scope["self"]._modules[name].float()
    b.program.tolerance = 1e-4
    b.program.odd.add(name)
    b.program.single.add(name)
    return b.value(f"self.{name}({h.name}.float()).to({h.name})", h.layout)


@production("s", 0.7, strange=True)
def attention_over_the_batch(b: Builder, h: Value) -> Value:
    """A batch-first tensor given to sequence-first attention: the samples attend to each other."""
    d = b.shape(h)[-1]
    name = b.module("m", f"nn.MultiheadAttention({d}, 1)")
    return b.value(f"self.{name}({h.name}, {h.name}, {h.name})[0]", "s")


@production("v", 0.5, strange=True)
def contrast(b: Builder, h: Value) -> Value:
    form = b.pick(("({0} @ {0}.t()).softmax(-1) @ {0}", "torch.cdist({0}, {0}).exp() @ {0} * 0.01"))
    return b.value(form.format(h.name), "v")


@production("v", 0.3, strange=True)
def one_row_for_all(b: Builder, h: Value) -> Value:
    """A layer on the mean over the batch, added to every sample."""
    d = b.shape(h)[1]
    layer = make_linear(b, d, d, "module")
    mean = b.value(f"{h.name}.mean(0, keepdim=True)", "v")
    row = b.value(applied(b, layer, mean.name, 2, 0), "v")
    return b.value(f"{h.name} + {row.name}", "v")
