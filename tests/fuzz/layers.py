"""Rules of the grammar: layers that hold weights."""

from __future__ import annotations

from fuzz.builder import Builder, Linear, Rejected, Value, production

__all__ = ["applied", "make_linear"]

LAST = "vsft"
"""Layouts whose last axis counts features."""


def make_linear(b: Builder, inputs: int, outputs: int, kind: str | None = None) -> Linear:
    """A new linear layer of some kind."""
    kind = kind or b.pick(("module", "sub", "replaced", "conv1d"), (12, 1, 1, 1))
    bias = b.chance(0.7) or kind == "conv1d"
    if kind == "conv1d":
        expression = f"Conv1D({outputs}, {inputs})"
    else:
        flag = "" if bias else ", bias=False"
        maker = "SubLinear" if kind == "sub" else "nn.Linear"
        expression = f"{maker}({inputs}, {outputs}{flag})"
        if kind == "replaced":
            expression = f"replaced({expression})"
    if kind != "module":
        b.feature("Conv1D" if kind == "conv1d" else kind, strange=kind == "conv1d")
    layer = Linear(b.module("l", expression), inputs, outputs, bias, kind)
    b.linears.append(layer)
    return layer


def applied(b: Builder, layer: Linear, t: str, axes: int, by_hand: float = 0.15) -> str:
    """Text that applies a layer to the variable t."""
    L, name = f"self.{layer.name}", layer.name
    plus = f" + {L}.bias" if layer.bias else ""
    if layer.kind == "conv1d":
        return f"tap('{name}', {t}, {L}({t}))"
    if not b.chance(by_hand):
        if b.chance(0.05):
            return f"tap('{name}', {t}, {L}(input={t}))"
        return f"tap('{name}', {t}, {L}({t}))"
    forms = [
        f"F.linear({t}, {L}.weight, {L}.bias)",
        f"F.linear({t}, {L}.weight){plus}",
        f"{t} @ {L}.weight.t(){plus}",
        f"torch.matmul({t}, {L}.weight.mT){plus}",
        f"{t}.matmul({L}.weight.T){plus}",
        f"torch.einsum('...i,oi->...o', {t}, {L}.weight){plus}",
        f"({L}.weight @ {t}.unsqueeze(-1)).squeeze(-1){plus}",
    ]
    if axes == 2:
        forms += [f"torch.mm({t}, {L}.weight.t()){plus}"]
        if layer.bias:
            forms += [f"torch.addmm({L}.bias, {t}, {L}.weight.t())"]
    b.feature("by hand", strange=True)
    return f"tap('{name}', {t}, {b.pick(forms)})"


@production(LAST, 10)
def linear(b: Builder, h: Value) -> Value:
    d = b.shape(h)[-1]
    known = [layer for layer in b.linears if layer.inputs == d]
    if known and b.chance(0.25):
        layer = b.pick(known)
        b.feature("reuse")
    else:
        layer = make_linear(b, d, b.width())
    return b.value(applied(b, layer, h.name, len(b.shape(h))), h.layout)


@production("1", 0.7)
def linear_over_positions(b: Builder, h: Value) -> Value:
    layer = make_linear(b, b.shape(h)[-1], b.width(), "module")
    return b.value(applied(b, layer, h.name, 3, 0), "1")


@production("1", 7)
def conv1d(b: Builder, h: Value) -> Value:
    return _conv(b, h, 1)


@production("2", 9)
def conv2d(b: Builder, h: Value) -> Value:
    return _conv(b, h, 2)


def _conv(b: Builder, h: Value, axes: int) -> Value:
    c = b.shape(h)[1]
    groups = b.pick([g for g in (1, 2, 3, 4, 5, 6) if c % g == 0])
    if b.chance(0.6):
        groups = 1
    out = groups * b.pick((1, 2)) if groups > 1 else b.pick((1, 2, 3))

    def sizes(choices: tuple[int, ...], weights: tuple[float, ...]) -> str:
        values = [b.pick(choices, weights) for _ in range(axes)]
        return str(values[0]) if len(set(values)) == 1 and b.chance(0.5) else str(tuple(values))

    options = []
    if b.chance(0.3):
        options.append(f"dilation={sizes((1, 2, 3), (2, 2, 1))}")
    if b.chance(0.25):
        options.append(f"padding={b.pick(('same', 'valid'))!r}")
    else:
        if b.chance(0.3):
            options.append(f"stride={sizes((1, 2, 3), (2, 2, 1))}")
        if b.chance(0.6):
            options.append(f"padding={sizes((0, 1, 2), (1, 3, 1))}")
    if b.chance(0.2):
        options.append(f"padding_mode={b.pick(('reflect', 'replicate', 'circular'))!r}")
    if groups > 1:
        options.append(f"groups={groups}")
        b.feature("groups")
    if b.chance(0.3):
        options.append("bias=False")
    kernel = sizes((1, 2, 3, 4), (1, 3, 3, 0.5))
    maker = f"nn.Conv{axes}d({', '.join([str(c), str(out), kernel, *options])})"
    name = b.module("c", maker)
    result = b.value(f"tap('{name}', {h.name}, self.{name}({h.name}))", h.layout)
    if out == c and b.shape(result) == b.shape(h) and b.chance(0.15):
        b.feature("reuse")
        t = result.name
        result = b.value(f"tap('{name}', {t}, self.{name}({t}))", h.layout)
    return result


@production("vsft12", 1.5)
def norm(b: Builder, h: Value) -> Value | None:
    shape, layout = b.shape(h), h.layout
    channels = shape[-1] if layout in LAST else shape[1]
    last = layout in LAST
    forms = [f"nn.LayerNorm({shape[-1]})"] if last else [f"nn.LayerNorm({list(shape[1:])})"]
    if last:
        forms += [
            # By default its epsilon, and so the function, depends on the dtype.
            f"nn.RMSNorm({shape[-1]}, eps=1e-6)",
            f"nn.LayerNorm({shape[-1]}, elementwise_affine=False)",
        ]
    if layout in "vt1":
        forms += [f"nn.BatchNorm1d({channels})"] * 3
    if layout == "2":
        forms += [f"nn.BatchNorm2d({channels})"] * 3
    if layout in "12":
        axes = int(layout)
        forms += [f"nn.InstanceNorm{axes}d({channels}, affine={b.chance(0.5)})"]
        forms += [f"nn.InstanceNorm{axes}d({channels}, track_running_stats=True)"]
    if layout in "v12":
        groups = b.pick([g for g in (1, 2, 3) if channels % g == 0])
        forms += [f"nn.GroupNorm({groups}, {channels})"]
    name = b.module("n", b.pick(forms))
    return b.value(f"self.{name}({h.name})", layout)


@production("vsf12", 0.8)
def activation_with_weight(b: Builder, h: Value) -> Value:
    shape = b.shape(h)
    channels = b.pick((1, shape[1])) if h.layout != "f" else 1
    name = b.module("p", f"nn.PReLU({channels})")
    return b.value(f"self.{name}({h.name})", h.layout)


@production("sf", 1.2)
def multihead_attention(b: Builder, h: Value) -> Value:
    d = b.shape(h)[-1]
    heads = b.pick([k for k in (1, 2, 3) if d % k == 0])
    first = h.layout == "s"
    if first and b.chance(0.25):
        # Sequence-first attention on a transposed value.
        h = b.value(f"{h.name}.transpose(0, 1)", "f")
        first = False
    options = ["batch_first=True"] if first else []
    if b.chance(0.2):
        options.append("bias=False")
    key = value = h.name
    if b.chance(0.2):
        k, v = b.width(), b.width()
        key_layer, value_layer = make_linear(b, d, k, "module"), make_linear(b, d, v, "module")
        key = b.value(applied(b, key_layer, h.name, 3, 0), h.layout).name
        value = b.value(applied(b, value_layer, h.name, 3, 0), h.layout).name
        options += [f"kdim={k}", f"vdim={v}"]
        b.feature("kdim")
    elif b.chance(0.15):
        options.append(b.pick(("add_bias_kv=True", "add_zero_attn=True")))
    name = b.module("m", f"nn.MultiheadAttention({', '.join([str(d), str(heads), *options])})")
    call = []
    steps = b.shape(h)[1 if first else 0]
    if "mask" in b.program.arguments and b.scope["mask"].shape[1] == steps and b.chance(0.6):
        call.append("key_padding_mask=mask")
        b.feature("padding mask")
    if b.chance(0.2):
        size = f"{h.name}.shape[{1 if first else 0}]"
        call.append(f"attn_mask=torch.ones({size}, {size}, dtype=torch.bool).triu(1)")
    if b.chance(0.5):
        call.append("need_weights=False")
    arguments = ", ".join([h.name, key, value, *call])
    result = b.value(f"self.{name}({arguments})[0]", h.layout)
    return b.value(f"{h.name} + {result.name}", h.layout) if b.chance(0.4) else result


@production("sf", 0.7)
def transformer_layer(b: Builder, h: Value) -> Value:
    d = b.shape(h)[-1]
    if d < 2:
        raise Rejected("too narrow")
    heads = b.pick([k for k in (1, 2, 3) if d % k == 0])
    options = [f"{d}", f"{heads}", f"{b.width() + 1}", "0.0" if b.chance(0.5) else "0.1"]
    if h.layout == "s":
        options.append("batch_first=True")
    if b.chance(0.3):
        options.append("activation='gelu'")
    if b.chance(0.4):
        options.append("norm_first=True")
    layer = f"nn.TransformerEncoderLayer({', '.join(options)})"
    stacked = b.chance(0.4)
    if stacked:
        layer = f"nn.TransformerEncoder({layer}, {b.pick((1, 2))}, enable_nested_tensor=False)"
    name = b.module("e", layer)
    call = ""
    steps = b.shape(h)[1 if h.layout == "s" else 0]
    if "mask" in b.program.arguments and b.scope["mask"].shape[1] == steps and b.chance(0.6):
        call = ", src_key_padding_mask=mask"
        b.feature("padding mask")
    return b.value(f"self.{name}({h.name}{call})", h.layout)


@production("s", 1)
def attention_by_hand(b: Builder, h: Value) -> Value:
    d, k = b.shape(h)[-1], b.width()
    names = []
    for width in (k, k, b.width()):
        layer = make_linear(b, d, width, "module")
        names.append(b.value(applied(b, layer, h.name, 3), "s").name)
    q, key, v = names
    if b.chance(0.3):
        return b.value(f"F.scaled_dot_product_attention({q}, {key}, {v})", "s")
    return b.value(f"({q} @ {key}.transpose(1, 2) / {k**0.5:.3f}).softmax(-1) @ {v}", "s")


@production("v", 0.4)
def bilinear(b: Builder, h: Value) -> Value:
    others = [v for v in b.pool if v.layout == "v"]
    other = b.pick(others)
    name = b.module("b", f"nn.Bilinear({b.shape(h)[1]}, {b.shape(other)[1]}, {b.pick((1, 2, 3))})")
    return b.value(f"self.{name}({h.name}, {other.name})", "v")


@production("vs", 0.4)
def parametrized(b: Builder, h: Value) -> Value:
    d, m = b.shape(h)[-1], b.width()
    kind = b.pick(("weight_norm", "spectral_norm", "prune", "buffer mask"))
    b.feature(kind, strange=True)
    if kind in ("weight_norm", "spectral_norm"):
        name = b.module("l", f"nn.utils.parametrizations.{kind}(nn.Linear({d}, {m}))")
    elif kind == "prune":
        inner = f"nn.Linear({d}, {m})"
        name = b.module("l", f"nn.utils.prune.random_unstructured({inner}, 'weight', amount=0.4)")
        b.program.pruned.add(name)
    else:
        layer = make_linear(b, d, m, "module")
        b.program.odd.add(layer.name)
        mask = b.name("k")
        b.setup(f"self.register_buffer('{mask}', torch.ones({m}, {d}).tril().double())")
        weight = f"self.{layer.name}.weight * self.{mask}"
        return b.value(f"F.linear({h.name}, {weight})", h.layout)
    return b.value(f"tap('{name}', {h.name}, self.{name}({h.name}))", h.layout)


@production("vs", 0.3)
def raw_parameter(b: Builder, h: Value) -> Value:
    d, m = b.shape(h)[-1], b.width()
    name = b.name("w")
    b.setup(f"self.{name} = nn.Parameter(torch.zeros({m}, {d}).double())")
    b.feature("raw parameter", strange=True)
    return b.value(f"F.linear({h.name}, self.{name})", h.layout)


@production("vs", 0.4)
def transposed_convolution_or_third_axis(b: Builder, h: Value) -> Value:
    if h.layout == "v":
        d = b.shape(h)[1]
        name = b.module("u", f"nn.ConvTranspose1d(1, {b.pick((1, 2))}, 2)")
        return b.value(f"self.{name}({h.name}.reshape(len({h.name}), 1, {d})).flatten(1)", "v")
    t, d = b.shape(h)[1:]
    name = b.module("u", "nn.Conv3d(1, 2, (1, 1, 2), padding=(0, 0, 1))")
    shaped = f"{h.name}.reshape(len({h.name}), 1, {t}, 1, {d})"
    return b.value(f"self.{name}({shaped}).flatten(1, 2).flatten(1, 2)", "s")
