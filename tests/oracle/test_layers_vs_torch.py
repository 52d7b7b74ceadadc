"""sl.nn.RNN, LSTM and GRU against torch.nn's, for every combination of options: outputs, final states and all
gradients in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import steploop as sl

T, B, INPUT, HIDDEN = 5, 4, 3, 5
LENGTHS = [3, 5, 1, 4]


@dataclass(frozen=True)
class Options:
    """The arguments of a layer's constructor."""

    kind: str
    num_layers: int
    bias: bool
    batch_first: bool
    bidirectional: bool
    nonlinearity: str | None = None
    proj_size: int | None = None

    def make(self, module, **more):
        given = {k: v for k, v in vars(self).items() if k != "kind" and v is not None}
        return getattr(module, self.kind)(INPUT, HIDDEN, **given, **more)

    def __str__(self):
        on = [name for name in ("bias", "batch_first", "bidirectional") if getattr(self, name)]
        extra = [str(v) for v in (self.nonlinearity, self.proj_size) if v]
        return "+".join([self.kind, *extra, f"{self.num_layers}layers", *on])


KINDS = [
    Options("RNN", 1, True, False, False, nonlinearity="tanh"),
    Options("RNN", 1, True, False, False, nonlinearity="relu"),
    Options("GRU", 1, True, False, False),
    Options("LSTM", 1, True, False, False),
    Options("LSTM", 1, True, False, False, proj_size=2),
]


def every_combination():
    for kind, layers, bias, first, both in itertools.product(KINDS, [1, 2], *[[False, True]] * 3):
        yield replace(kind, num_layers=layers, bias=bias, batch_first=first, bidirectional=both)


ALL_OPTIONS = list(every_combination())
# For the compiled backend, which captures each layer anew: every kind, batch_first and bidirectional.
SOME_OPTIONS = [o for o in ALL_OPTIONS if o.bias and o.batch_first == o.bidirectional and o.num_layers != 1]


def make_pair(options, backend):
    """The same layer twice: torch's, and ours with its weights."""
    torch.manual_seed(5)
    theirs = options.make(torch.nn, dtype=torch.float64)
    ours = options.make(sl.nn, dtype=torch.float64, backend=backend)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def dense(options):
    x = torch.randn(B, T, INPUT, dtype=torch.float64)
    return x if options.batch_first else x.transpose(0, 1).contiguous()


def packed(x, options, enforce_sorted):
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    return pack_padded_sequence(x, lengths, batch_first=options.batch_first, enforce_sorted=enforce_sorted)


FORMS = {
    "dense": lambda x, options: x,
    "unbatched": lambda x, options: x[0] if options.batch_first else x[:, 0],
    "sorted": lambda x, options: packed(x, options, True),
    "unsorted": lambda x, options: packed(x, options, False),
}


def given_state(options, form):
    """None, or h_0 (for LSTM: h_0 and c_0) without and with a need of gradients."""
    rows = options.num_layers * (2 if options.bidirectional else 1)
    widths = [options.proj_size or HIDDEN] + ([HIDDEN] if options.kind == "LSTM" else [])
    shapes = [(rows, width) if form == "unbatched" else (rows, B, width) for width in widths]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def flat(result):
    """Name -> tensor of all that a layer returns."""
    outputs, final = result
    final = final if isinstance(final, tuple) else (final,)
    values = {f"final {k}": value for k, value in enumerate(final)}
    if isinstance(outputs, PackedSequence):
        return values | {f"packed {k}": value for k, value in enumerate(outputs) if value is not None}
    return values | {"outputs": outputs}


def run(layer, x, form, options, hx):
    """What the layer returns, and the gradients of all inputs and weights."""
    x = x.clone().requires_grad_()
    hx = None if hx is None else [h.detach().clone().requires_grad_() for h in hx]
    given = None if hx is None else (tuple(hx) if options.kind == "LSTM" else hx[0])
    values = flat(layer(FORMS[form](x, options), given))
    generator = torch.Generator().manual_seed(2)
    floating = [v for v in values.values() if v.requires_grad]
    cotangents = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in floating]
    leaves = {"x": x} | {f"hx {k}": h for k, h in enumerate(hx or ())} | dict(layer.named_parameters())
    results = torch.autograd.grad(floating, list(leaves.values()), cotangents)
    return values | {f"gradient of {name}": g for name, g in zip(leaves, results, strict=True)}


def assert_same(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name],
            expected,
            rtol=0.0,
            atol=1e-11 * max(1.0, expected.detach().abs().max().item()),
            msg=lambda m, n=name: f"{n}: {m}",
        )


def compare(options, backend, forms=FORMS):
    theirs, ours = make_pair(options, backend)
    for form in forms:
        x = dense(options)
        for hx in (None, given_state(options, form)):
            assert_same(run(ours, x, form, options, hx), run(theirs, x, form, options, hx))


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=str)
def test_equal_to_torch(options):
    compare(options, "reference")


@pytest.mark.parametrize("options", SOME_OPTIONS, ids=str)
def test_equal_to_torch_compiled(options):
    compare(options, "auto")


def test_some_options_cover_every_kind_and_direction():
    assert {(o.kind, o.nonlinearity, o.proj_size) for o in SOME_OPTIONS} == {
        (o.kind, o.nonlinearity, o.proj_size) for o in KINDS
    }
    for name in ("batch_first", "bidirectional"):
        assert {getattr(o, name) for o in SOME_OPTIONS} == {False, True}


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=str)
def test_same_constructor(options):
    """Same initial values for a seed, names, attributes, repr; state_dict both ways."""
    torch.manual_seed(9)
    theirs = options.make(torch.nn, dropout=0.0)
    torch.manual_seed(9)
    ours = options.make(sl.nn, dropout=0.0)
    assert repr(ours) == repr(theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for (name, mine), (_, other) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(mine, other), name
    for name in (*theirs.__constants__, *(["nonlinearity"] if options.kind == "RNN" else [])):
        assert getattr(ours, name) == getattr(theirs, name), name
    fresh = options.make(torch.nn)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    options.make(sl.nn).load_state_dict(fresh.state_dict(), strict=True)
    assert isinstance(ours, getattr(torch.nn, options.kind))
    assert list(ours.children()) == []
    shapes = [[w.shape for w in layer] for layer in theirs.all_weights]
    assert [[w.shape for w in layer] for layer in ours.all_weights] == shapes


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_acts_between_layers(bidirectional, backend):
    """p = 1: the upper layers see zeros in training, as torch's do; in eval mode nothing is dropped."""
    options = Options("GRU", 3, True, False, bidirectional)
    torch.manual_seed(5)
    theirs = options.make(torch.nn, dropout=1.0, dtype=torch.float64)
    ours = options.make(sl.nn, dropout=1.0, dtype=torch.float64, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    x = dense(options)
    for layer in (theirs, ours):
        layer.train()
    in_training = ours(x)
    torch.testing.assert_close(in_training, theirs(x))
    for layer in (theirs, ours):
        layer.eval()
    torch.testing.assert_close(ours(x), theirs(x))
    assert not torch.allclose(ours(x)[0], in_training[0])


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_drops_the_right_share(bidirectional, backend):
    """Layer 1 of an identity RNN sees ones times a dropout mask: its outputs are the mask."""
    layer = sl.nn.RNN(8, 8, 2, "relu", False, dropout=0.3, bidirectional=bidirectional, backend=backend)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            weight.zero_()
            if "ih" in name:
                weight[:, :8].copy_(torch.eye(8))
    outputs, _ = layer(torch.ones(100, 10, 8))
    seen = outputs[..., :8]
    assert torch.allclose(seen[seen > 0], torch.tensor(1 / 0.7))
    share = (seen == 0).double().mean().item()
    assert abs(share - 0.3) < 0.03
    assert not torch.equal(seen[0], seen[1])
