"""Runs the same call on the plain loop and on a compiled backend, and compares everything that comes out:
outputs, final states or carry, and the gradients of all that can have one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import steploop as sl
from steploop.closed_over import trainable

# Of each tensor's largest entry.
VALUES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
GRADIENTS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def situations(lengths, holes, resets):
    """The arguments of a loop's calls by which rows run, each way by itself and all together."""
    return {
        "plain": {},
        "lengths": {"lengths": lengths},
        "holes": {"mask": holes},
        "resets": {"resets": resets},
        "all": {"lengths": lengths, "mask": holes, "resets": resets},
    }


def agree(step, *xs, backend="eager", save=("all", "states"), loop=None, backward=True, **call):
    """Compare a Step under `backend` with the reference; returns what the reference gave.

    Tensors among the arguments that require a gradient, and parameters and closed-over leaves, get compared.
    """

    def runner(name, policy):
        # What is given as `state` stays as it is: its own leaves are in `call`.
        made = sl.Loop(step, backend=name, save=policy, **(loop or {}))
        return lambda leaves, rest: made(*leaves, **rest)

    return _compare(runner, step, xs, call, backend, save, backward)


def agree_scan(fn, init, xs, *, backend="eager", backward=True, **call):
    """The same for a function given to scan."""

    def runner(name, _):
        return lambda leaves, rest: sl.scan(fn, *leaves, backend=name, **rest)

    return _compare(runner, fn, (init, xs), call, backend, ("auto",), backward)


def _compare(runner, root, xs, call, backend, policies, backward):
    expected = everything(runner("reference", "auto"), root, xs, call, backward)
    for policy in (policies,) if isinstance(policies, str) else policies:
        found = everything(runner(backend, policy), root, xs, call, backward)
        check(expected, found, f"{backend}, save={policy!r}")
    return expected


def everything(run, root, xs, call, backward=True):
    """{name: tensor} of what a call gives, its gradients among it."""
    torch.manual_seed(7)
    xs, call = pytree.tree_map_only(Tensor, _copy, (xs, call))
    call = {k: sl.unbatched(_copy(v.tree)) if hasattr(v, "tree") else v for k, v in call.items()}
    results = run(xs, call)
    leaves, structure = pytree.tree_flatten(_plain(results))
    values = {f"result {i}": v for i, v in enumerate(leaves) if isinstance(v, Tensor)}
    found = dict(values, structure=structure)
    found["plain"] = [v for v in leaves if not isinstance(v, Tensor)]
    if backward and torch.is_grad_enabled():
        found.update(_gradients(values, root, xs, call))
    return found


def _plain(results):
    """States as a dict of their values: what they remember beside is no result of the call."""

    def is_states(value):
        return isinstance(value, sl.States)

    return pytree.tree_map(lambda r: dict(r) if is_states(r) else r, results, is_leaf=is_states)


def _copy(tensor):
    copy = tensor.detach().clone(memory_format=torch.preserve_format)
    if tensor.stride() != copy.stride() and tensor.numel():
        copy = tensor.detach()
    return copy.requires_grad_(tensor.requires_grad)


def _leaves(root, xs, call):
    given = pytree.tree_leaves((xs, call))
    given += [v.tree for v in call.values() if hasattr(v, "tree")]
    found = {f"argument {i}": t for i, t in enumerate(given) if isinstance(t, Tensor) and t.requires_grad}
    named = root.named_parameters() if isinstance(root, nn.Module) else ()
    for name, tensor in (*named, *trainable(root)):
        if tensor.requires_grad and all(tensor is not t for t in found.values()):
            found[name] = tensor
    return found


def _gradients(values, root, xs, call):
    leaves = _leaves(root, xs, call)
    tracked = [v for v in values.values() if v.requires_grad]
    found = {"tracked": [n for n, v in values.items() if v.requires_grad]}
    if not leaves or not tracked:
        return found
    generator = torch.Generator().manual_seed(3)
    # Drawn for every result, so that both ways get the same whichever of their results are tracked.
    drawn = [torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in values.values()]
    cotangents = [d.to(v.device, v.dtype) for d, v in zip(drawn, values.values(), strict=True) if v.requires_grad]
    got = torch.autograd.grad(
        tracked, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    return found | {f"gradient of {n}": g for n, g in zip(leaves, got, strict=True)}


def check(expected, found, what):
    assert found["structure"] == expected["structure"], what
    assert found["plain"] == expected["plain"], what
    # A result that depends on no leaf in the plain loop may seem to in the compiled one: to autograd the
    # call is one operation.
    assert set(expected.get("tracked", ())) <= set(found.get("tracked", ())), what
    for name in expected:
        if isinstance(expected[name], Tensor):
            compare(expected[name], found[name], f"{what}: {name}", name.startswith("gradient"))


def compare(expected, found, what, gradient=False):
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, not {tuple(expected.shape)}"
    assert found.dtype == expected.dtype, f"{what}: {found.dtype}, not {expected.dtype}"
    if expected.is_complex():
        expected, found = torch.view_as_real(expected.resolve_conj()), torch.view_as_real(found.resolve_conj())
    if not expected.is_floating_point():
        assert torch.equal(expected, found), f"{what}:\n{found}\nnot\n{expected}"
        return
    if not expected.numel():
        return
    assert bool(found.isfinite().all()) or not bool(expected.isfinite().all()), f"{what} is not finite"
    largest = max(float(expected.detach().abs().max()), 1e-300)
    error = float((expected - found).detach().abs().max())
    allowed = (GRADIENTS if gradient else VALUES)[expected.dtype]
    assert error <= allowed * largest or torch.equal(expected, found), (
        f"{what}: off by {error / largest:.2e} of the largest entry ({largest:.2e}), allowed {allowed:.0e}"
    )
