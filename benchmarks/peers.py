"""One class per peer. A peer that is missing, or cannot do a workload, raises Blank with the reason.

`Peer.make(work, data, mode)` gives a Runner. Modes: "forward" (no gradients), "training" (forward, and
gradients of all parameters), "training_x" (also of x and, where there is one, of the memory).
"""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import steploop as sl

from .data import DEEP, SEARCHES, Data, Workload, make_data
from .models import make_model, zero_states

Arrays = dict[str, np.ndarray]


class Blank(Exception):
    """This peer has no value here; the message says why."""


class Runner:
    """`run` does the whole work once; `arrays` turns what it gave into NumPy arrays ("y", "grad ...").

    A runner whose result is not to be compared (another problem, a roofline) has compare=False. `again` gives
    it other data, of other sizes perhaps, without making the peer anew.
    """

    def __init__(
        self,
        run: Callable[[], Any],
        arrays: Callable[[Any], Arrays] = lambda _: {},
        note: Callable[[], str] = lambda: "",
        compare: bool = True,
        calls: int = 1,
        again: Callable[[Data], None] | None = None,
    ):
        self.run, self.arrays, self.note, self.compare, self.calls = run, arrays, note, compare, calls
        self.again = again


class Peer:
    """What is measured. `name` is what --peers takes, `title` stands in tables."""

    name = ""
    title = ""
    ours = False
    module = ""  # what must be importable
    build_limit = 300.0  # seconds for building and the first run

    def make(self, work: Workload, data: Data, mode: str) -> Runner:
        raise NotImplementedError

    def check_installed(self) -> None:
        """Blank where the peer's library is missing."""
        if not self.module:
            return
        try:
            importlib.import_module(self.module)
        except Exception as error:  # a broken install is a missing peer, whatever it raises
            raise Blank(f"{self.module} is not installed ({type(error).__name__})") from error


def tensors_of(data: Data) -> dict[str, Tensor]:
    """The arrays of a workload as tensors, by field name."""
    return {k: torch.from_numpy(np.asarray(v)) for k, v in vars(data).items() if v is not None}


def constants_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in ("memory", "memory_mask") if name in tensors}


def torch_runner(
    forward: Callable[[], Tensor],
    parameters: dict[str, Tensor],
    tensors: dict[str, Tensor],
    mode: str,
    note: Callable[[], str] = lambda: "",
) -> Runner:
    """A Runner of a PyTorch function of no arguments that reads its inputs from `tensors`."""

    def again(data: Data) -> None:
        tensors.clear()
        tensors.update(tensors_of(data))

    if mode == "forward":

        def infer() -> Tensor:
            with torch.no_grad():
                return forward()

        return Runner(infer, lambda y: {"y": y.numpy()}, note, again=again)
    leaves = dict(parameters)
    if mode == "training_x":
        leaves |= {name: tensors[name].requires_grad_() for name in ("x", "memory") if name in tensors}

    def train() -> tuple[Tensor, tuple[Tensor, ...]]:
        y = forward()
        return y.detach(), torch.autograd.grad(y, list(leaves.values()), tensors["cotangent"])

    def arrays(result: Any) -> Arrays:
        y, gradients = result
        named = zip(leaves, gradients, strict=True)
        return {"y": y.numpy()} | {f"grad {name}": gradient.numpy() for name, gradient in named}

    return Runner(train, arrays, note, again=again)


class Steploop(Peer):
    """steploop with one backend."""

    ours = True

    def __init__(
        self, name: str, title: str, backend: str = "auto", save: str = "auto", padded: bool = False
    ):
        self.name, self.title, self.backend, self.save, self.padded = name, title, backend, save, padded

    def make(self, work: Workload, data: Data, mode: str) -> Runner:
        model, tensors = make_model(work), tensors_of(data)
        loop = sl.Loop(model, backend=self.backend, save=self.save)
        taken = ("resets",) if self.padded else ("resets", "lengths")

        def arguments() -> dict[str, Tensor]:
            return {k: tensors[k] for k in taken if k in tensors} | constants_of(tensors)

        def forward() -> Tensor:
            return loop(tensors["x"], **arguments())[0]

        def note() -> str:
            plan = loop.plan(tensors["x"], **arguments())
            return "loops run by " + ", ".join(sorted({str(part.backend) for part in plan.loops}))

        runner = torch_runner(forward, dict(model.named_parameters()), tensors, mode, note)
        runner.compare = not self.padded
        return runner


class OwnLSTM(Steploop):
    """steploop's own LSTM at the sizes of another workload: what a stranger's step is compared with."""

    def make(self, work: Workload, data: Data, mode: str) -> Runner:
        lstm = Workload("lstm", work.T, work.B, work.I, work.H)
        runner = super().make(lstm, make_data(lstm), mode)
        runner.compare = False
        return runner


class TorchNN(Peer):
    """torch.nn.LSTM and GRU, on padded sequences or on a PackedSequence (packing included)."""

    def __init__(self, name: str, title: str, padded: bool = False):
        self.name, self.title, self.padded = name, title, padded

    def make(self, work: Workload, data: Data, mode: str) -> Runner:
        layers = {"lstm": nn.LSTM, "gru": nn.GRU}
        if work.kind not in layers:
            raise Blank("torch.nn has no such layer")
        model, tensors = make_model(work), tensors_of(data)
        layer = layers[work.kind](work.I, work.H)
        layer.load_state_dict({f"{name}_l0": value for name, value in model.state_dict().items()})
        parameters = {name.removesuffix("_l0"): p for name, p in layer.named_parameters()}
        whole = self.padded or not work.ragged

        def padded() -> Tensor:
            return layer(tensors["x"])[0]

        def packed() -> Tensor:
            x = tensors["x"]
            y = layer(pack_padded_sequence(x, tensors["lengths"], enforce_sorted=False))[0]
            return pad_packed_sequence(y, total_length=x.shape[0])[0]

        runner = torch_runner(padded if whole else packed, parameters, tensors, mode)
        runner.compare = not self.padded
        return runner


class EagerLoop(Peer):
    """A Python loop over the step. `hoist`: the input product by hand, before the loop."""

    def __init__(self, name: str, title: str, hoist: bool = False):
        self.name, self.title, self.hoist = name, title, hoist

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def make(self, work: Workload, data: Data, mode: str) -> Runner:
        if work.ragged:
            raise Blank("ragged batches are not written by hand here")
        model, tensors = make_model(work), tensors_of(data)
        advance, hoist = model.advance, self.hoist

        def one(x: Tensor, states: tuple[Tensor, ...], reset: Tensor | None, **constants: Tensor) -> Any:
            if reset is not None:
                keep = ~reset.unsqueeze(1)
                states = tuple(s * keep for s in states)
            return advance(x if hoist else model.project(x), states, **constants)

        body = self.compiled(one)

        def forward() -> Tensor:
            resets, constants = tensors.get("resets"), constants_of(tensors)
            xs = model.project(tensors["x"]) if hoist else tensors["x"]
            states = zero_states(work, xs)
            outputs = []
            for t, x in enumerate(xs.unbind(0)):
                states, y = body(x, states, None if resets is None else resets[t], **constants)
                outputs.append(y)
            return torch.stack(outputs)

        return torch_runner(forward, dict(model.named_parameters()), tensors, mode)


class CompiledCell(EagerLoop):
    """A Python loop over a cell compiled by torch.compile; the input product by hand, before the loop."""

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        torch._dynamo.reset()
        return torch.compile(function)


class Compiled(EagerLoop):
    """torch.compile of the whole loop, which it unrolls: only for small T."""

    longest = 64

    def make(self, work: Workload, data: Data, mode: str) -> Runner:
        if work.T > self.longest:
            raise Blank(f"unrolls the loop: not tried beyond T={self.longest}")
        model, tensors = make_model(work), tensors_of(data)
        torch._dynamo.reset()

        @torch.compile
        def whole(x: Tensor, resets: Tensor | None, constants: dict[str, Tensor]) -> Tensor:
            states = zero_states(work, x)
            projected, outputs = model.project(x), []
            for t in range(x.shape[0]):
                if resets is not None:
                    keep = ~resets[t].unsqueeze(1)
                    states = tuple(s * keep for s in states)
                states, y = model.advance(projected[t], states, **constants)
                outputs.append(y)
            return torch.stack(outputs)

        forward = lambda: whole(tensors["x"], tensors.get("resets"), constants_of(tensors))
        return torch_runner(forward, dict(model.named_parameters()), tensors, mode)


class ScanHOP(Peer):
    """torch's scan, a higher-order operator, called as it is; the input product before it.

    In torch 2.13 Inductor cannot compile these scans on CPU (DataDependentOutputException), so nothing is
    wrapped around the call.
    """

    name, title = "scan", "torch scan"

    def make(self, work: Workload, data: Data, mode: str) -> Runner:
        if work.ragged:
            raise Blank("ragged batches are not written by hand here")
        try:
            from torch._higher_order_ops.scan import scan
        except ImportError as error:
            raise Blank("this torch has no scan") from error
        model, tensors = make_model(work), tensors_of(data)
        constants = constants_of(tensors)
        torch._dynamo.reset()

        def body(states: tuple[Tensor, ...], slices: Any) -> Any:
            x, *reset = slices
            if reset:
                keep = ~reset[0].unsqueeze(1)
                states = tuple(s * keep for s in states)
            states, y = model.advance(x, states, **constants)
            return states, y.clone()  # its outputs may not alias each other

        def whole(x: Tensor, resets: Tensor | None) -> Tensor:
            initial = zero_states(work, x)
            xs = (model.project(x),) if resets is None else (model.project(x), resets)
            return scan(body, initial, xs)[1]

        forward = lambda: whole(tensors["x"], tensors.get("resets"))
        return torch_runner(forward, dict(model.named_parameters()), tensors, mode)


class Jax(Peer):
    """jax.lax.scan under jit, the input product before it."""

    name, title, module = "jax", "JAX scan", "jax"

    def make(self, work: Workload, data: Data, mode: str) -> Runner:
        if work.ragged:
            raise Blank("ragged batches are not written by hand here")
        self.check_installed()
        import jax

        from .jax_models import sequence

        p = {k: jax.numpy.asarray(v.numpy()) for k, v in make_model(work).state_dict().items()}
        given: dict[str, Any] = {}

        def again(data: Data) -> None:
            given.clear()
            given.update({k: jax.numpy.asarray(v) for k, v in vars(data).items() if v is not None})

        def outputs(p: Any, x: Any, memory: Any, masks: Any) -> Any:
            return sequence(work.kind, work.H, p, x, **memory, **masks)[0]

        def gradients(p: Any, x: Any, memory: Any, masks: Any, cotangent: Any) -> Any:
            if mode == "training_x":
                y, pull = jax.vjp(lambda *a: outputs(*a, masks), p, x, memory)
                by_parameter, by_x, by_memory = pull(cotangent)
                return y, by_parameter | {"x": by_x} | by_memory
            y, pull = jax.vjp(lambda p: outputs(p, x, memory, masks), p)
            return y, pull(cotangent)[0]

        def arguments() -> tuple[Any, ...]:
            pick = lambda *names: {name: given[name] for name in names if name in given}
            return p, given["x"], pick("memory"), pick("resets", "memory_mask")

        again(data)
        if mode == "forward":
            function = jax.jit(outputs)
            run = lambda: (jax.block_until_ready(function(*arguments())), {})
        else:
            function = jax.jit(gradients)
            run = lambda: jax.block_until_ready(function(*arguments(), given["cotangent"]))
        return Runner(run, named_arrays, again=again)


def named_arrays(result: Any) -> Arrays:
    """(y, gradients by name) as NumPy arrays."""
    y, gradients = result
    return {"y": np.asarray(y)} | {f"grad {name}": np.asarray(g) for name, g in gradients.items()}


class Keras(Peer):
    """Keras 3's layers on its JAX backend, under jit. Keras is batch first and is given batch-first data."""

    name, title = "keras", "Keras (JAX)"

    def make(self, work: Workload, data: Data, mode: str) -> Runner:
        if work.ragged:
            raise Blank("ragged batches are not written by hand here")
        os.environ.setdefault("KERAS_BACKEND", "jax")
        for self.module in ("jax", "keras"):
            self.check_installed()
        import jax

        from . import keras_models

        layer = keras_models.make_layer(work.kind, work.I, work.H)
        if layer is None:
            raise Blank("Keras has no such layer")
        x = data.x
        if data.resets is not None:
            x = np.concatenate([x, data.resets[:, :, None].astype(x.dtype)], -1)
        x = jax.numpy.asarray(np.ascontiguousarray(x.transpose(1, 0, 2)))
        cotangent = jax.numpy.asarray(np.ascontiguousarray(data.cotangent.transpose(1, 0, 2)))
        layer.build(x.shape)
        weights = {k: v.numpy() for k, v in make_model(work).state_dict().items()}
        for variable, value in zip(
            layer.trainable_variables, keras_models.to_keras(work.kind, weights), strict=True
        ):
            variable.assign(value)
        p = [v.value for v in layer.trainable_variables]
        rest = [v.value for v in layer.non_trainable_variables]
        outputs = lambda p, x: layer.stateless_call(p, rest, x)[0]

        def gradients(p: Any, x: Any, cotangent: Any) -> Any:
            if mode == "training_x":
                y, pull = jax.vjp(outputs, p, x)
                return y, *pull(cotangent)
            y, pull = jax.vjp(lambda p: outputs(p, x), p)
            return y, pull(cotangent)[0]

        if mode == "forward":
            function = jax.jit(outputs)
            run = lambda: (jax.block_until_ready(function(p, x)),)
        else:
            function = jax.jit(gradients)
            run = lambda: jax.block_until_ready(function(p, x, cotangent))

        def arrays(result: Any) -> Arrays:
            y, *grads = result
            named: Arrays = {"y": np.asarray(y).transpose(1, 0, 2)}
            if grads:
                by_name = keras_models.from_keras(work.kind, [np.asarray(g) for g in grads[0]])
                named |= {f"grad {name}": value for name, value in by_name.items()}
            if len(grads) > 1:
                by_x = np.asarray(grads[1])[:, :, : work.I]
                named["grad x"] = by_x.transpose(1, 0, 2)
            return named

        return Runner(run, arrays)


class Gemm(Peer):
    """The roofline: the step's weight products alone, each as one matrix product over all T * B rows."""

    name, title = "gemm", "GEMM roofline"

    def make(self, work: Workload, data: Data, mode: str) -> Runner:
        if work.kind not in ("lstm", "gru", "stranger"):
            raise Blank("no roofline is defined for this step")
        rows, gates = work.T * work.B, (3 if work.kind == "gru" else 4) * work.H
        x, h = torch.from_numpy(data.x).reshape(rows, -1), torch.randn(rows, work.H)
        sums, w_x, w_h = torch.randn(rows, gates), torch.randn(gates, work.I), torch.randn(gates, work.H)
        pairs = [(x, w_x.t()), (h, w_h.t())]
        if mode != "forward":
            pairs += [(sums.t(), x), (sums.t(), h), (sums, w_h)]
        if mode == "training_x":
            pairs += [(sums, w_x)]
        results = [torch.empty(a.shape[0], b.shape[1]) for a, b in pairs]

        def run() -> None:
            for (a, b), out in zip(pairs, results, strict=True):
                torch.mm(a, b, out=out)

        return Runner(run, compare=False)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Steploop("steploop", "steploop"),
        Steploop("steploop-cpu", 'steploop backend="cpu"', backend="cpu"),
        Steploop("steploop-eager", 'steploop backend="eager"', backend="eager"),
        Steploop("steploop-states", 'steploop save="states"', save="states"),
        Steploop("steploop-all", 'steploop save="all"', save="all"),
        Steploop("steploop-padded", "steploop, padded", padded=True),
        OwnLSTM("steploop-lstm", "steploop's own LSTM"),
        TorchNN("torch.nn", "torch.nn"),
        TorchNN("torch.nn-padded", "torch.nn, padded", padded=True),
        EagerLoop("eager", "eager loop"),
        EagerLoop("eager-hoisted", "eager loop, input product hoisted", hoist=True),
        CompiledCell("compile-cell", "torch.compile of the cell, looped", hoist=True),
        Compiled("compile", "torch.compile of the whole loop"),
        ScanHOP(),
        Jax(),
        Keras(),
        Gemm(),
    )
}


def make_runner(name: str, work: Workload, data: Data, mode: str) -> Runner:
    """The peer's runner; anything that goes wrong while it is made is a Blank."""
    if name not in PEERS:
        raise Blank("no such peer")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if work.kind in SEARCHES:
                from . import searches

                return searches.make_first_runner(name, work)
            if work.V:
                from . import seq2seq

                return seq2seq.make_runner(PEERS[name], work, data, mode)
            if work.kind in DEEP:
                from . import deep

                return deep.make_runner(work, data, mode)
            return PEERS[name].make(work, data, mode)
    except Blank:
        raise
    except Exception as error:  # whatever a peer raises, the others are measured
        raise Blank(short(error)) from error


def short(error: BaseException) -> str:
    """An error on one line, without the folders of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"(?:/[\w.+-]+)+/", "", " ".join(lines))
    return f"{type(error).__name__}: {text}"[:200]
