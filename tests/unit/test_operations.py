"""The table of operations says only what is true: every claim is tried on torch's own operation."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import steploop as sl
from steploop.compiler.ops.table import TABLE, is_zero, linear_groups, linear_in, operation_of

aten = torch.ops.aten


def r(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


MASK = torch.tensor([[True, False, True, False]] * 3)
PLACES = torch.tensor([[0, 2, 1, 1]] * 3)
X, Y = r(3, 4), r(3, 4) + 2
FIRST_OF = {  # what is additive in its first argument, whatever else it is given
    "neg": (), "positive": (), "_to_copy": (), "mean": ([1],), "sum": ([1],), "cumsum": (1,),
    "view": ([4, 3],), "reshape": ([12],), "_unsafe_view": ([12],), "squeeze": (1,), "unsqueeze": (1,),
    "expand": ([2, 3, 4],), "permute": ([1, 0],), "transpose": (0, 1), "t": (), "select": (1, 2), "slice": (1, 1, 3),
    "split": (2, 1), "split_with_sizes": ([1, 3], 1), "chunk": (2, 1), "unbind": (1,), "diagonal": (), "clone": (),
    "unfold": (1, 2, 1), "alias": (), "detach": (), "contiguous": (), "flip": ([1],), "roll": ([1], [1]),
    "repeat": ([2, 1],), "diag_embed": (), "triu": (), "tril": (), "native_dropout_backward": (MASK, 2.0),
    "diagonal_backward": ([3, 4, 4], 0, 1, 2), "select_backward": ([3, 5, 4], 1, 2),
    "slice_backward": ([3, 9], 1, 2, 6, 1), "view_as_complex": (),
    "sigmoid_backward": (Y,), "tanh_backward": (Y,), "threshold_backward": (Y, 2.0), "silu_backward": (Y,),
    "gelu_backward": (Y,), "softplus_backward": (Y, 1.0, 20.0), "elu_backward": (1.0, 1.0, 1.0, False, Y),
    "leaky_relu_backward": (Y, 0.1, False), "hardtanh_backward": (Y, 1.0, 2.0),
    "log_sigmoid_backward": (Y, (-Y.abs()).exp()),
    "glu_backward": (r(3, 8), 1),
    "_softmax_backward_data": (Y.softmax(1), 1, torch.float64), "index": ([None, PLACES[0]],),
    "_log_softmax_backward_data": (Y.log_softmax(1), 1, torch.float64), "_unsafe_index": ([None, PLACES[0]],),
    "index_select": (1, PLACES[0]), "gather": (1, PLACES), "embedding": (PLACES % 3,),
}  # fmt: skip
MORE = {  # with all their arguments
    "add": (X, Y), "sub": (X, Y), "rsub": (X, Y), "mul": (X, Y), "div": (X, Y), "where": (MASK, X, Y),
    "lerp": (X, Y, r(4)), "addcmul": (X, Y, r(3, 1)), "addcdiv": (X, Y, Y), "masked_fill": (X, MASK, torch.tensor(2.0)),
    "mm": (X, r(4, 2)), "bmm": (r(2, 3, 4), r(2, 4, 5)), "mv": (X, r(4)), "addmm": (r(3, 2), X, r(4, 2)),
    "cat": ([X, Y], 1), "stack": ([X, Y], 1), "constant_pad_nd": (X, [1, 1]), "select_scatter": (X, r(3), 1, 2),
    "slice_scatter": (X, r(3, 2), 1, 0, 2), "diagonal_scatter": (X, r(3)), "scatter_add": (X, 1, PLACES, Y),
    "unfold_backward": (r(3, 3, 2), [3, 4], 1, 2, 1), "view_as_real": (torch.complex(X, Y),),
    "_conj": (torch.complex(X, Y),),
    "view_as_complex": (r(3, 2),), "embedding_dense_backward": (r(3, 4, 2), PLACES, 5, -1, False),
}  # fmt: skip
SAMPLES = {**{name: (X, *rest) for name, rest in FIRST_OF.items()}, **MORE}


def call(name, args):
    packet = getattr(aten, name)
    kwargs = {"dtype": torch.float32} if name == "_to_copy" else {}
    return packet(*args, **kwargs)


def node_of(name, args, kwargs=None):
    """A call whose tensors are inputs of a graph."""
    graph = fx.Graph()
    target = getattr(aten, name)
    target = getattr(target, target.overloads()[0]) if isinstance(target, torch._ops.OpOverloadPacket) else target

    def placeholder(value):
        node = graph.placeholder(f"v{len(graph.nodes)}")
        node.meta["val"] = value
        return node

    node = graph.call_function(target, tree_map_only(torch.Tensor, placeholder, args), kwargs or {})
    node.meta["val"] = torch.zeros(1)
    return node


LINEAR = sorted(name for name, row in TABLE.items() if row.linear)


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_called_linear_is_additive(name):
    args = SAMPLES[name]
    for group in TABLE[name].linear:
        one, two = change(args, group, 1), change(args, group, 2)
        total = change(args, group, 1, 2)
        results = [tree_leaves(call(name, a)) for a in (one, two, total)]
        for first, second, both in zip(*results, strict=True):
            torch.testing.assert_close(first + second, both, rtol=1e-5, atol=1e-5)


def change(args, group, *seeds):
    """The arguments with other numbers in those of a group; with several seeds, the sum of what each seed gives."""

    def other(value):
        draws = [
            torch.randn(value.shape, generator=torch.Generator().manual_seed(s), dtype=value.dtype) for s in seeds
        ]
        return sum(draws)

    return tuple(tree_map_only(torch.Tensor, other, a) if i in group else a for i, a in enumerate(args))


@pytest.mark.parametrize("name", sorted(n for n, row in TABLE.items() if row.view))
def test_what_is_called_a_view_computes_nothing(name):
    args = SAMPLES[name]
    shown = tree_leaves(call(name, args))
    first = torch.view_as_real(args[0]) if args[0].is_complex() else args[0]
    numbers = set(first.flatten().tolist())
    for result in shown:
        result = torch.view_as_real(result) if result.is_complex() else result
        assert set(result.flatten().tolist()) <= numbers
    if TABLE[name].view == "shape" and name not in ("expand",):
        assert shown[0].numel() * (2 if shown[0].is_complex() else 1) == first.numel()


POINTWISE = {
    "where": (MASK, X, Y), "masked_fill": (X, MASK, torch.tensor(2.0)), "fill": (X, 2.0), "copy": (X, Y),
    "complex": (X, Y), "polar": (X, Y), "bucketize": (X, r(5).sort().values), "floor_divide": (X, Y),
    "_to_copy": (X,), "_conj": (torch.complex(X, Y),), "_neg_view": (X,), "hardswish": (X,),
    "alias": (X,), "detach": (X,),
    "_prelu_kernel": (X, Y), "hardswish_backward": (X, Y), "hardsigmoid_backward": (X, Y), "clone": (X,),
    "softshrink_backward": (X, Y, 0.5), "hardshrink_backward": (X, Y, 0.5), "contiguous": (X,),
    **{n: SAMPLES[n] for n in ("softplus_backward", "elu_backward", "leaky_relu_backward", "hardtanh_backward",
                               "log_sigmoid_backward", "native_dropout_backward")},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(n for n, row in TABLE.items() if row.pointwise))
def test_what_is_called_pointwise_looks_at_one_number(name):
    args = POINTWISE[name]
    flat, spec = tree_flatten(args)
    before = call(name, args)
    for i, value in enumerate(flat):
        if isinstance(value, torch.Tensor) and value.shape == X.shape:
            changed = value.clone()
            changed[1, 2] = not value[1, 2] if value.dtype == torch.bool else value[1, 2] + 1.5
            after = call(name, tree_unflatten([*flat[:i], changed, *flat[i + 1 :]], spec))
            same = (after == before).reshape(12) if not after.is_complex() else (after == before).flatten()
            assert same[torch.arange(12) != 6].all()


@pytest.mark.parametrize("name", sorted(n for n, row in TABLE.items() if row.factory))
def test_what_is_called_a_factory_reads_no_numbers(name):
    sizes = {"arange": (5,), "scalar_tensor": (2.0,), "eye": (3,), "full": ([2, 3], 1.5)}
    if name in sizes or name in ("zeros", "ones"):
        args = sizes.get(name, ([2, 3],))
        assert torch.equal(call(name, args), call(name, args))
    else:
        more = {"new_zeros": ([2],), "new_ones": ([2],), "new_full": ([2], 1.5), "full_like": (1.5,)}.get(name, ())
        assert torch.equal(call(name, (X, *more)), call(name, (Y * float("nan"), *more)))


def test_a_number_that_is_added_is_not_linear():
    assert not linear_groups(node_of("add", (X, 1.0)))
    assert not linear_groups(node_of("sub", (X, 1.0)))
    assert linear_groups(node_of("add", (X, 0)))
    assert not linear_groups(node_of("constant_pad_nd", (X, [1, 1], 3.0)))
    assert linear_groups(node_of("constant_pad_nd", (X, [1, 1])))


def test_a_square_is_not_linear():
    node = node_of("mul", (X, Y))
    node.args = (node.args[0], node.args[0])
    assert not linear_groups(node)


def test_rounding_is_not_linear():
    node = node_of("div", (X, Y))
    assert linear_in(node, [node.args[0]]) and not linear_in(node, [node.args[1]])
    node.target = aten.div.Tensor_mode
    assert not linear_groups(node)
    copied = node_of("_to_copy", (X,), {"dtype": torch.int64})
    copied.meta["val"] = torch.zeros(1, dtype=torch.int64)
    assert not linear_groups(copied)


def test_zeros_are_known():
    graph = fx.Graph()
    assert is_zero(graph.call_function(aten.zeros.default, ([3],)))
    assert is_zero(graph.call_function(aten.full.default, ([3], 0.0)))
    assert not is_zero(graph.call_function(aten.full.default, ([3], 1.0)))
    assert is_zero(0) and is_zero(None) and not is_zero(1e-9)


def test_a_name_from_elsewhere_is_not_atens():
    """An operation of one's own may be called like one of torch's: nothing of that one holds for it."""
    with torch.library._scoped_library("test_operations", "DEF") as library:
        library.define("cumsum(Tensor x, int dim) -> Tensor")
        library.impl("cumsum", lambda x, dim: 3 * x.sum(0, keepdim=True) + x, "CompositeExplicitAutograd")
        own = torch.ops.test_operations.cumsum.default
        node = fx.Graph().call_function(own, (X, 1))
        assert operation_of(node).rows is None and not operation_of(node).linear

        class Mixes(sl.Step):
            def __init__(self):
                super().__init__()
                self.h = sl.State(4)

            def step(self, x):
                self.h.next = torch.tanh(torch.ops.test_operations.cumsum(x, 1) + self.h.prev)
                return self.h.next

        x = torch.randn(5, 3, 4)
        torch.testing.assert_close(sl.Loop(Mixes())(x)[0], sl.Loop(Mixes(), backend="reference")(x)[0])


class _AddsAnything(torch.autograd.Function):
    """Its gradient is not linear in what it is given."""

    @staticmethod
    def forward(ctx, x, w, how):
        ctx.save_for_backward(x, w)
        ctx.how = how
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, ctx.how((grad * x).sum_to_size(w.shape)), None


GRADIENTS = {
    "plus a number": lambda g: g + 0.5, "a number minus": lambda g: 1 - g, "squared": lambda g: g * g,
    "rounded": lambda g: torch.div(g, 0.25, rounding_mode="floor"), "in whole numbers": lambda g: g.int().float(),
    "padded": lambda g: torch.nn.functional.pad(g, (1, 0), value=2.0)[..., 1:] + torch.nn.functional.pad(
        g, (1, 0), value=2.0)[..., :-1],
    "scaled": lambda g: 3 * g, "with zeros": lambda g: torch.where(g.new_ones(4) > 0, g, 0.0),
    "by itself": lambda g: g @ g.mT @ g if g.dim() > 1 else g * g.norm(),
}  # fmt: skip


@pytest.mark.parametrize("how", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("lengths", [None, [5, 2, 4]], ids=["full", "ragged"])
def test_gradients_of_ones_own(how, lengths):
    class Own(sl.Step):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.linspace(0.5, 1.5, 4))
            self.h = sl.State(4)

        def step(self, x, c):
            self.h.next = torch.tanh(_AddsAnything.apply(x, self.w, how) + self.h.prev)
            return _AddsAnything.apply(self.h.next, c, how)

    torch.manual_seed(0)
    x = torch.randn(5, 3, 4)
    found = []
    for backend in ("reference", "eager", "auto"):
        step, c = Own(), torch.ones(3, 4, requires_grad=True)
        if lengths is None:
            output, _ = sl.Loop(step, backend=backend)(x, c=c)
        else:
            output, _ = sl.Loop(step, backend=backend)(x, c=c, lengths=torch.tensor(lengths))
        output.square().sum().backward()
        found.append((step.w.grad, c.grad))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
