"""Rules of the grammar: where and how often layers are called."""

from __future__ import annotations

from fuzz.builder import Builder, Value, production
from fuzz.layers import applied, make_linear

__all__: list[str] = []


@production("vs", 0.8)
def nested(b: Builder, h: Value) -> Value:
    """Layers inside of modules."""
    d, m = b.shape(h)[-1], b.width()
    kind = b.pick(("Block", "Sequential", "Sequential"))
    if kind == "Block":
        name = b.module("g", f"Block({d}, {m})")
    else:
        act = b.pick(("nn.ReLU(inplace=True)", "nn.Tanh()", "nn.GELU()", "nn.Identity()"))
        name = b.module("g", f"nn.Sequential(nn.Linear({d}, {m}), {act}, nn.Linear({m}, {d}))")
    value = b.value(f"self.{name}({h.name})", h.layout)
    if b.chance(0.15):
        b.feature("reuse")
        value = b.value(f"self.{name}({value.name})", h.layout)
    return value


@production("2", 0.7)
def linear_on_channels_last(b: Builder, h: Value) -> Value:
    layer = make_linear(b, b.shape(h)[1], b.width())
    name = b.name("h")
    b.line(f"{name} = {h.name}.permute(0, 2, 3, 1)")
    return b.value(f"{applied(b, layer, name, 4)}.permute(0, 3, 1, 2)", "2")


@production("vs12", 0.4)
def nothing_joined(b: Builder, h: Value) -> Value:
    """Operands without entries."""
    x = h.name
    forms = (
        f"torch.cat([{x}, {x}[:, :0]], 1)",
        f"{x} + {x}[:, :0].sum()",
        f"torch.cat([{x}[:, :0].relu(), {x}], 1)",
    )
    return b.value(b.pick(forms), h.layout)


@production("vs12", 0.6)
def factors_of_other_kinds(b: Builder, h: Value) -> Value:
    """Booleans, integers, and expanded tensors as factors."""
    x, k = h.name, b.shape(h)[1]
    axes = ", 1" * (len(b.shape(h)) - 2)
    name = b.name("k")
    b.setup(f"self.register_buffer('{name}', torch.arange({k}).reshape(1, {k}{axes}))")
    K = f"self.{name}"
    forms = (
        f"{x} * {K}",
        f"{K} * {x}",
        f"{x} * ({K} > 0)",
        f"{x} + {K}",
        f"{x} / ({K} + 1)",
        f"{x} * {K}.to({x}).expand_as({x})",
        f"torch.where({K} > 0, {x}, 0.5)",
        f"{x} * ({K} % 2 == 0) * {K}.float()",
        f"{x}.masked_fill({K} == 0, 0.0)",
        f"{x} - {K}.bool().to({x})",
        f"{x} ** ({K} + 1)",
    )
    return b.value(b.pick(forms), h.layout)


@production("vs", 1.0, strange=True)
def parts_of_the_batch(b: Builder, h: Value) -> Value:
    """A layer called on a few samples at a time."""
    layer = make_linear(b, b.shape(h)[-1], b.width())
    x = h.name
    forms = (
        "torch.cat([{0} for p in {1}.chunk(2)])",
        "torch.cat([{0} for p in {1}.split(1)])",
        "torch.stack([{0} for p in {1}])",
        "torch.cat([{0} for p in ({1}[:1], {1}[1:])])",
    )
    form = b.pick(forms)
    axes = len(b.shape(h)) - ("stack" in form)
    return b.value(form.format(applied(b, layer, "p", axes), x), h.layout)


@production("v", 1.0, strange=True)
def experts(b: Builder, h: Value) -> Value:
    """Every sample goes through one of two layers, by its own values."""
    d, m = b.shape(h)[1], b.width()
    one, two = (make_linear(b, d, m, "module") for _ in range(2))
    x, chosen, out = h.name, b.name("h"), b.name("h")
    b.line(f"{chosen} = {x}[:, 0] > 0")
    b.line(f"{out} = {x}.new_zeros(len({x}), {m})")
    left, right = b.name("h"), b.name("h")
    b.line(f"{left}, {right} = {x}[{chosen}], {x}[~{chosen}]")
    if b.chance(0.5):
        b.line(f"{out}[{chosen}] = {applied(b, one, left, 2, 0)}")
        b.line(f"{out}[~{chosen}] = {applied(b, two, right, 2, 0)}")
        return b.named(out, "v")
    b.line(f"{out} = {out}.index_put(({chosen},), {applied(b, one, left, 2, 0)})")
    return b.value(f"{out}.index_put((~{chosen},), {applied(b, two, right, 2, 0)})", "v")


@production("v", 0.7, strange=True)
def rows_sorted(b: Builder, h: Value) -> Value:
    """An order of the samples by their values, undone after a layer."""
    layer = make_linear(b, b.shape(h)[1], b.width())
    order, rows = b.name("h"), b.name("h")
    b.line(f"{order} = {h.name}[:, 0].argsort()")
    b.line(f"{rows} = {h.name}[{order}]")
    return b.value(f"({applied(b, layer, rows, 2)})[{order}.argsort()]", "v")


@production("v", 0.7, strange=True)
def graph_by_indices(b: Builder, h: Value) -> Value:
    """Rows are nodes; edges by number."""
    x, source = h.name, b.name("h")
    b.line(f"{source} = torch.arange(len({x}) - 1)")
    forms = (
        "{0}.index_add(0, {1} + 1, {0}[{1}])",
        "{0} + torch.zeros_like({0}).index_add(0, {1}, {0}[{1} + 1])",
        "{0} + torch.zeros_like({0}).scatter_add(0, ({1} + 1)[:, None].expand(-1, {0}.shape[1]),"
        " {0}[{1}])",
    )
    return b.value(b.pick(forms).format(x, source), "v")


@production("vs", 0.7, strange=True)
def vectorized_map(b: Builder, h: Value) -> Value:
    layer = make_linear(b, b.shape(h)[-1], b.width(), "module")
    b.program.odd.add(layer.name)
    form = b.pick(("torch.vmap(self.{0})({1})", "torch.vmap(lambda t: self.{0}(t).tanh())({1})"))
    return b.value(form.format(layer.name, h.name), h.layout)


@production("v", 0.7, strange=True)
def derivative_by_func(b: Builder, h: Value) -> Value:
    layer = make_linear(b, b.shape(h)[1], b.width(), "module")
    b.program.odd.add(layer.name)
    L, x = f"self.{layer.name}", h.name
    forms = (
        f"torch.func.grad(lambda t: {L}(t).tanh().sum())({x})",
        f"torch.vmap(torch.func.grad(lambda t: {L}(t).square().sum()))({x})",
        f"torch.func.jvp(lambda t: {L}(t).tanh(), ({x},), ({x},))[1]",
    )
    return b.value(b.pick(forms), "v")


@production("vs", 0.8, strange=True)
def users_hook(b: Builder, h: Value) -> Value:
    kind = b.pick(("pre", "post", "look", "backward"))
    d = b.shape(h)[-1]
    name = b.module("l", f"with_hook(nn.Linear({d}, {b.width()}), {kind!r})")
    if kind in ("pre", "post"):
        b.program.odd.add(name)
    b.feature(f"hook: {kind}")
    return b.value(f"tap('{name}', {h.name}, self.{name}({h.name}))", h.layout)


@production("vs12", 0.5, strange=True)
def gradient_hook(b: Builder, h: Value) -> Value:
    return b.value(f"hooked({h.name})", h.layout)


@production("v", 0.5)
def recurrent(b: Builder, h: Value) -> Value:
    d, m = b.shape(h)[1], b.width()
    kind = b.pick(("GRUCell", "LSTMCell", "RNNCell"))
    name = b.module("r", f"nn.{kind}({d}, {m})")
    tail = "[0]" if kind == "LSTMCell" else ""
    return b.value(f"self.{name}({h.name}){tail}", "v")


@production("s", 0.5)
def recurrent_layer(b: Builder, h: Value) -> Value:
    d, m = b.shape(h)[2], b.width()
    kind = b.pick(("GRU", "LSTM", "RNN"))
    name = b.module("r", f"nn.{kind}({d}, {m}, batch_first=True)")
    return b.value(f"self.{name}({h.name})[0]", "s")


@production("vs", 0.7)
def unrolled(b: Builder, h: Value) -> Value:
    """One layer in series and in parallel."""
    d = b.shape(h)[-1]
    layer = make_linear(b, d, d, "module")
    b.feature("reuse")
    x = h.name
    for _ in range(b.pick((2, 3))):
        value = b.value(f"{applied(b, layer, x, len(b.shape(h)), 0.1)}.relu()", h.layout)
        x = value.name
    if b.chance(0.5):
        return b.value(f"{x} + {applied(b, layer, h.name, len(b.shape(h)), 0.1)}", h.layout)
    return value


@production("s12", 0.5)
def checkerboard(b: Builder, h: Value) -> Value:
    """One layer on parts of a sample."""
    if h.layout == "s":
        layer = make_linear(b, b.shape(h)[2], b.width(), "module")
        t, u = b.name("h"), b.name("h")
        b.line(f"{t}, {u} = {h.name}[:, :1], {h.name}[:, 1:]")
        b.feature("reuse")
        first, rest = applied(b, layer, t, 3, 0), applied(b, layer, u, 3, 0)
        return b.value(f"torch.cat([{first}, ({rest}).relu()], 1)", "s")
    axes = h.layout
    name = b.module("c", f"nn.Conv{axes}d({b.shape(h)[1]}, {b.pick((1, 2))}, 1)")
    t, u = b.name("h"), b.name("h")
    b.line(f"{t}, {u} = {h.name}[:, :, :1], {h.name}[:, :, 1:]")
    b.feature("reuse")
    calls = [f"tap('{name}', {p}, self.{name}({p}))" for p in (t, u)]
    return b.value(f"torch.cat([{calls[0]}, {calls[1]}.tanh()], 2)", h.layout)
