"""Layers over whole sequences, one above the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import torchscript
from ..errors import InputError, StateError, StepError, UnsupportedError, describe, message
from ..loop import Loop
from ..states import States
from ..step import Step
from ._constants import check_constants_used, constants_for
from .bidirectional import Bidirectional
from .stack import Stack
from .torch_layer import TorchLayer

_MARKS = ("lengths", "mask", "resets")


class Layers(nn.Module):
    """Layers that each see the whole sequence: what goes in goes through each in turn.

        layers = sl.nn.Layers(
            sl.nn.Bidirectional(sl.nn.LayerNormLSTMCell(40, 64), sl.nn.LayerNormLSTMCell(40, 64)),
            sl.nn.Dropout(0.1),
            sl.nn.Bidirectional(sl.nn.LayerNormLSTMCell(128, 64), sl.nn.LayerNormLSTMCell(128, 64)),
            nn.Linear(128, 10),
        )
        outputs, state = layers(xs, ..., state=None, lengths=None, mask=None, resets=None, ...)

    The arguments and results are those of `sl.Loop`. Every layer gets the same lengths, mask and resets; a masked step
    is as if it were not there, in every layer. A PackedSequence goes in and comes out packed.

    A layer is an sl.Loop, a Bidirectional, another Layers, an sl.nn.RNN, LSTM or GRU, a Step (run by a Loop of its
    own), or an nn.Module without memory that takes one step (B, ...) (nn.Linear, nn.LayerNorm). To run unidirectional
    layers as ONE loop, which streams and searches, use `sl.nn.Stack`.
    The first layer takes all per-step inputs, each later one the output of the layer below. A constant (keyword
    argument) goes to every layer whose step names it. `steps=` and `batch_size=` are for the first layer.
    state: an sl.States with all layers' states: "0.forward.h", "2.backward.c", ...; those of an sl.nn.LSTM in layer k
    are "k.h" and "k.c", (B, num_layers * directions, features).
    The children are named "0", "1", ...; `layers[k]`, `len(layers)` and iteration give them, Steps in their Loops.
    batch_first: as for sl.Loop; the layers given must have the same. backend, save: of the Loops made here.

    Raises StepError for no layers and for what is no layer; UnsupportedError for a Loop that ends by itself (until=);
    InputError where batch_first differs; StateError for a wrong state.
    """

    if TYPE_CHECKING:
        # As type checkers see it: torch's own __call__ gives Any.
        def __call__(self, *xs: Any, **arguments: Any) -> tuple[Any, States]: ...

    def __init__(
        self, *layers: nn.Module, batch_first: bool = False, backend: str = "auto", save: str = "auto"
    ) -> None:
        super().__init__()
        if not layers:
            raise StepError(
                message("Layers has no layers.", fix="Layers(Bidirectional(GRUCell(8, 16), GRUCell(8, 16)))")
            )
        self.batch_first = batch_first
        options = {"batch_first": batch_first, "backend": backend, "save": save}
        for k, layer in enumerate(layers):
            self.add_module(str(k), _whole_sequence(layer, k, options))
        self._check()

    @property
    def _named(self) -> dict[str, nn.Module]:
        """The layers by name. (torch's `named_children` leaves out a layer that comes a second time.)"""
        return {name: layer for name, layer in self._modules.items() if layer is not None}

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._named.values())

    def __getitem__(self, k: int) -> nn.Module:
        return list(self)[k]

    def forward(self, *xs: Any, **arguments: Any) -> tuple[Any, States]:
        """Run all layers; see the class. Returns (outputs of the last layer, States of all)."""
        return self._run(xs, arguments, "__call__")

    def last_output(self, *xs: Any, **arguments: Any) -> tuple[Any, States]:
        """As a call, but with the last layer's `last_output`: (B, ...), each row's output at its last valid step."""
        return self._run(xs, arguments, "last_output")

    def _run(self, xs: tuple[Any, ...], arguments: dict[str, Any], last: str) -> tuple[Any, States]:
        self._check()
        given = self._split(arguments.pop("state", None))
        marks = {name: arguments.pop(name, None) for name in _MARKS}
        first = {name: arguments.pop(name) for name in ("steps", "batch_size") if name in arguments}
        shown = {"on_masked": arguments.pop("on_masked")} if "on_masked" in arguments else {}
        check_constants_used(self, [step for layer in self for step in _steps_of(layer)], arguments)
        values: dict[str, Tensor] = {}
        own: dict[str, Tensor] = {}
        counts: list[States] = []
        for name, layer in self._named.items():
            is_last = name == [*self._named][-1]
            options: dict[str, Any] = marks | first | (shown if is_last else {}) | _constants_of(layer, arguments)
            outputs, state = _call(layer, xs, given.get(name), options, last if is_last else "__call__")
            values |= {f"{name}.{path}": value for path, value in state.items()}
            own |= {f"{name}.{path}": value for path, value in state._own.items()}
            counts += [] if isinstance(layer, TorchLayer) else [state]  # an sl.nn.LSTM does not count its steps
            xs, first = (outputs,), {}
        states = States(values, own)
        states.count((lambda: counts[0].steps) if counts else None)
        return outputs, states

    def _split(self, state: Any) -> dict[str, States | None]:
        """Each layer's own states, by its name; None for all where none was given."""
        torchscript.refuse_proxy(state)
        if state is None:
            return dict.fromkeys(self._modules)
        if not isinstance(state, Mapping):
            raise StateError(message("Layers: `state` is not a dictionary of states.", found=describe(state)))
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in self._modules}
        for name, value in state.items():
            layer, dot, path = str(name).partition(".")
            if layer not in parts or not dot:
                raise StateError(
                    message(
                        "Layers: a given state belongs to no layer.",
                        expected=f"names <layer>.<state>, with a layer from 0 to {len(self) - 1}",
                        found=repr(name),
                        fix="pass the state that an earlier call of these layers returned",
                    )
                )
            parts[layer][path] = value
        return {name: States(part) for name, part in parts.items()}

    def _check(self) -> None:
        """At every call: a layer may have been changed or replaced since the last one."""
        for name, layer in self._named.items():
            if getattr(layer, "until", None) is not None:
                raise UnsupportedError(
                    message(
                        f"Layers: the Loop in layer {name} ends by itself, so that the layer above does not know which "
                        "steps were taken.",
                        found=f"until={layer.until!r}",
                        fix="sl.nn.Stack runs the layers step by step: sl.Loop(sl.nn.Stack(...), until=...)",
                    )
                )
            turned = getattr(layer, "batch_first", self.batch_first)
            if turned != self.batch_first:
                raise InputError(
                    message(
                        f"Layers: layer {name} expects its axes in another order than the layers around it.",
                        expected=f"batch_first={self.batch_first}, as Layers(..., batch_first={self.batch_first})",
                        found=f"{type(layer).__name__} with batch_first={turned}",
                        fix=f"Layers(..., batch_first={turned}), with the same in every layer that names it",
                    )
                )

    def extra_repr(self) -> str:
        return "batch_first=True" if self.batch_first else ""


def _whole_sequence(layer: Any, k: int, options: dict[str, Any]) -> Any:
    """A layer as it was given if it takes whole sequences, else in a Loop."""
    if isinstance(layer, (Loop, Bidirectional, Layers, TorchLayer)):
        return layer
    if isinstance(layer, nn.RNNBase):
        name = type(layer).__name__
        raise StepError(
            message(
                f"Layers: layer {k} is torch's {name}, which takes no lengths, mask or resets.",
                expected=f"sl.nn.{name}",
                found=f"torch.nn.{name}",
                fix=f"sl.nn.{name} has the same arguments and parameter names",
            )
        )
    if isinstance(layer, Step):
        return Loop(layer, **options)
    if isinstance(layer, nn.Module):
        return Loop(Stack(layer), **options)
    raise StepError(
        message(
            f"Layers: layer {k} is no layer.",
            expected="a Bidirectional, Loop, Step, sl.nn.LSTM or an nn.Module",
            found=type(layer).__name__,
            fix="Layers(*layers)" if isinstance(layer, (list, tuple)) else None,
        )
    )


def _steps_of(layer: nn.Module) -> list[Step]:
    """The Steps by whose arguments it is known which constants a layer takes."""
    if isinstance(layer, Loop):
        return [layer.step]
    if isinstance(layer, Bidirectional):
        return [layer.forward_loop.step, layer.backward_loop.step]
    return [step for below in layer for step in _steps_of(below)] if isinstance(layer, Layers) else []


def _constants_of(layer: nn.Module, constants: dict[str, Any]) -> dict[str, Any]:
    taken: dict[str, Any] = {}
    for step in _steps_of(layer):
        taken |= constants_for(step, constants, begin=True)
    return taken


def _call(
    layer: Any, xs: tuple[Any, ...], state: States | None, options: dict[str, Any], method: str
) -> tuple[Any, States]:
    if isinstance(layer, TorchLayer):
        return _call_torch_layer(layer, xs, state, options, method)
    return getattr(layer, method)(*xs, state=state, **options)


# ---- sl.nn.RNN, LSTM and GRU: their states are tensors in a tuple, with B on axis 1 --------------------------


def _call_torch_layer(
    layer: Any, xs: tuple[Any, ...], state: States | None, options: dict[str, Any], method: str
) -> tuple[Any, States]:
    who = type(layer).__name__
    if options.get("on_masked", "zero") != "zero" or method != "__call__":
        raise UnsupportedError(
            message(
                f"Layers: sl.nn.{who} as the last layer gives its outputs at all steps, zeros at masked ones.",
                expected="a call without on_masked, and not last_output",
                fix=f"sl.Loop(sl.nn.{who}Cell(...)) or sl.nn.Bidirectional(...) as the last layer",
            )
        )
    _check_one_sequence(who, layer, xs)
    outputs, hx = layer(xs[0], _as_tuple(layer, who, state), **{name: options[name] for name in _MARKS})
    named = zip(layer._states, hx if layer._returns_tuple else (hx,), strict=True)
    values = {name: value.transpose(0, 1) for name, value in named}
    return outputs, States(values, {name: torch.zeros_like(value) for name, value in values.items()})


def _check_one_sequence(who: str, layer: Any, xs: tuple[Any, ...]) -> None:
    packed = [isinstance(x, PackedSequence) for x in xs]
    if len(xs) == 1 and (packed[0] or (isinstance(xs[0], Tensor) and xs[0].dim() == 3)):
        return
    raise InputError(
        message(
            f"Layers: sl.nn.{who} takes one sequence with a batch.",
            expected="(B, T, I)" if layer.batch_first else "(T, B, I)",
            found=", ".join(describe(x) for x in xs) or "no sequence",
        )
    )


def _as_tuple(layer: Any, who: str, state: States | None) -> Any:
    """hx, from states (B, layers, features) by name."""
    if state is None:
        return None
    if sorted(state) != sorted(layer._states) or not all(
        isinstance(v, Tensor) and v.dim() == 3 for v in state.values()
    ):
        raise StateError(
            message(
                f"Layers: a given state is not what sl.nn.{who} has.",
                expected=", ".join(f"'{name}' (B, layers, features)" for name in layer._states),
                found=", ".join(f"'{name}' {describe(value)}" for name, value in state.items()) or "no states",
                fix="pass the state that an earlier call of these layers returned",
            )
        )
    values = tuple(state[name].transpose(0, 1) for name in layer._states)
    return values if layer._returns_tuple else values[0]
