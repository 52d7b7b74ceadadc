"""What torch.nn's RNN, LSTM and GRU have in common when steploop runs them: their axes, states, weights and loops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import nn as torch_nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from .. import torchscript
from ..errors import InputError, StateError, describe, message
from ..loop import Loop
from ..step import Step, unbatched


class _Layers(Step):
    """Layers "0", "1", ..., dropout between them. The weights are constants named like torch's: weight_ih_l0,
    ..."""

    def __init__(self, make_layer: Any, count: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        for k in range(count):
            self.add_module(str(k), make_layer())

    def step(self, x: Tensor, **weights: Tensor) -> Tensor:
        for k, layer in enumerate(self.children()):
            if k and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            suffix = f"_l{k}"
            x = layer(x, **{n.removesuffix(suffix): w for n, w in weights.items() if n.endswith(suffix)})
        return x


if TYPE_CHECKING:
    _Base = torch_nn.RNNBase
else:
    _Base = object


class TorchLayer(_Base):
    """Mixed in before a torch.nn.RNNBase: `forward` through sl.Loop, and no second list of the weights."""

    _states: tuple[str, ...] = ("h",)
    _make_step: Any  # one layer's Step, made from the torch layer

    def __init__(self, *args: Any, backend: str = "auto", save: str = "auto", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.backend = backend
        self.save = save
        _ = self._loop_of_direction  # a wrong backend or save is an error here

    # -- torch keeps a second list of the weights, for cuDNN; here the parameters are the only truth

    @property
    def _flat_weights(self) -> list[Tensor]:  # type: ignore[override]
        return [getattr(self, name) for name in self._flat_weights_names]

    def _init_flat_weights(self) -> None:
        self._flat_weight_refs: list[Any] = []

    def _weights_have_changed(self) -> bool:
        return False

    def __setattr__(self, name: str, value: Any) -> None:
        torch_nn.Module.__setattr__(self, name, value)

    def _replicate_for_data_parallel(self) -> Any:
        return torch_nn.Module._replicate_for_data_parallel(self)

    def flatten_parameters(self) -> None:
        """Nothing to do; kept so that code written for torch.nn runs."""

    # -- the loops follow from the constructor's arguments, so copies and pickles leave them out

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("_loops", None)
        return state

    @property
    def _loop_of_direction(self) -> tuple[Loop[Any], ...]:
        """One loop over all layers; bidirectional: one for each direction, which every layer uses in turn."""
        if "_loops" not in self.__dict__:
            # Held in a tuple: the loops are not children, as torch's layers have none.
            self._loops = tuple(self._make_loop(reverse) for reverse in ((False, True)[: self._directions]))
        return self._loops

    def _make_loop(self, reverse: bool) -> Loop[Any]:
        count = 1 if self.bidirectional else self.num_layers
        layers = _Layers(lambda: type(self)._make_step(self), count, self.dropout)
        return Loop(layers, reverse=reverse, backend=self.backend, save=self.save)

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks for of every module."""
        raise torchscript.error()

    # -- running

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Any]:
        """As torch.nn's. input: (T, B, I), (B, T, I) with batch_first, (T, I), or a PackedSequence.

        hx: h_0, for LSTM (h_0, c_0), of shape (num_layers * directions, B, H), without B for (T, I) input; or
        None. lengths (B,), mask and resets (T, B) ((B, T) with batch_first, (T,) for (T, I) input) as for
        sl.Loop, beyond torch.
        Returns the outputs, shaped like the input with directions * H features (zero at masked steps), and
        the state after each row's last valid step, shaped like hx.  T may be 0, and so may a length.
        Raises InputError for a wrong input, StateError for a wrong hx.
        """
        axes = _Axes(self, input)
        # Once per call: a parametrization (spectral_norm) computes, and may change itself, at every reading.
        weights = dict(zip(self._flat_weights_names, self._flat_weights, strict=True))
        self._check_input(axes, next(iter(weights.values())))
        hx = self._check_state(hx, axes)
        masks = {"lengths": axes.add_batch(lengths, 0)}
        masks |= {"mask": axes.time_major(mask), "resets": axes.time_major(resets)}
        run = self._run_both if self.bidirectional else self._run_one
        outputs, finals = run(axes.sequence, hx, weights, masks)
        last = tuple(torch.stack(axis) if axes.batched else torch.cat(axis) for axis in finals)
        return axes.restore(outputs), last if self._returns_tuple else last[0]

    @property
    def _returns_tuple(self) -> bool:
        return len(self._states) > 1

    def _run_one(
        self, xs: Any, hx: Any, weights: dict[str, Tensor], masks: dict[str, Any]
    ) -> tuple[Any, list[list[Tensor]]]:
        """The outputs, and for each kind of state a list of its values by layer."""
        return self._run_loop(0, list(range(self.num_layers)), xs, hx, weights, masks)

    def _run_both(
        self, xs: Any, hx: Any, weights: dict[str, Tensor], masks: dict[str, Any]
    ) -> tuple[Any, list[list[Tensor]]]:
        """The outputs, and for each kind of state a list of its values by layer and direction."""
        finals: list[list[Tensor]] = [[] for _ in self._states]
        for k in range(self.num_layers):
            if k and self.dropout:
                xs = _map_sequence(lambda t: F.dropout(t, self.dropout, self.training), xs)
            both = []
            for direction in range(2):
                outputs, last = self._run_loop(direction, [k], xs, hx, weights, masks)
                both.append(outputs)
                for axis, values in zip(finals, last, strict=True):
                    axis.extend(values)
            xs = _map_sequence(lambda a, b: torch.cat([a, b], dim=-1), *both)
        return xs, finals

    def _run_loop(
        self, direction: int, layers: list[int], xs: Any, hx: Any, weights: dict[str, Tensor], masks: dict[str, Any]
    ) -> tuple[Any, list[list[Tensor]]]:
        """`layers` of one direction as one loop."""
        loop = self._loop_of_direction[direction]
        self._bring_up_to_date(loop)
        constants, state = {}, {}
        for place, k in enumerate(layers):
            row = k * self._directions + direction
            for name in self._weight_names(k, direction):
                # In its loop a layer is called by its place there: 0 for every layer of a bidirectional one.
                constants[f"{name.split('_l')[0]}_l{place}"] = unbatched(weights[name])
            for name, value in zip(self._states, hx or (), strict=False):
                state[f"{place}.{name}"] = value[row]
        outputs, final = loop(xs, state=state or None, **masks, **constants)
        return outputs, [[final[f"{place}.{name}"] for place in range(len(layers))] for name in self._states]

    def _bring_up_to_date(self, loop: Loop[Any]) -> None:
        """The loop is no child: train() and eval() do not reach it, nor does `layer.dropout = 0.1`."""
        if loop.training != self.training:
            loop.train(self.training)
        loop.step.dropout = self.dropout
        loop.backend, loop.save = self.backend, self.save

    def _weight_names(self, layer: int, direction: int) -> list[str]:
        suffix = f"_l{layer}" + ("_reverse" if direction else "")
        return [name for name in self._flat_weights_names if name[name.index("_l") :] == suffix]

    # -- checks

    def _check_input(self, axes: _Axes, weight: Tensor) -> None:
        leaf, who = axes.leaf, type(self).__name__
        if leaf.shape[-1] != self.input_size:
            raise InputError(
                message(
                    f"{who}: the input has another number of features than input_size.",
                    expected=f"input_size={self.input_size} on the last axis",
                    found=describe(leaf),
                )
            )
        if leaf.dtype == weight.dtype:
            return
        if not torch.is_autocast_enabled(leaf.device.type):
            raise InputError(
                message(
                    f"{who}: the input and the weights differ in dtype.",
                    expected=f"{weight.dtype}, as the weights",
                    found=describe(leaf),
                    fix=f"input.to({weight.dtype}) or layer.to({leaf.dtype})",
                )
            )
        # The states take the input's dtype; they must not be of half precision.
        axes.sequence = _map_sequence(lambda t: t.to(weight.dtype), axes.sequence)

    def _check_state(self, hx: Any, axes: _Axes) -> tuple[Tensor, ...] | None:
        """hx as a tuple of (num_layers * directions, B, features) tensors."""
        if hx is None:
            return None
        who, names = type(self).__name__, [f"{name}_0" for name in self._states]
        values = tuple(hx) if isinstance(hx, (tuple, list)) and self._returns_tuple else (hx,)
        if len(values) != len(names) or not all(isinstance(v, Tensor) for v in values):
            raise StateError(
                message(
                    f"{who}: hx is not what this layer's state consists of.",
                    expected=f"a tuple ({', '.join(names)})"
                    if self._returns_tuple
                    else f"one tensor {names[0]}",
                    found=f"a {type(hx).__name__} of {len(hx)}"
                    if isinstance(hx, (tuple, list))
                    else describe(hx),
                )
            )
        widths = {"h_0": self.proj_size or self.hidden_size, "c_0": self.hidden_size}
        for name, value in zip(names, values, strict=True):
            rows = self.num_layers * self._directions
            expected = (rows, axes.batch, widths[name]) if axes.batched else (rows, widths[name])
            if tuple(value.shape) != expected:
                axis_names = (
                    "num_layers * directions, B, features"
                    if axes.batched
                    else "num_layers * directions, features"
                )
                raise StateError(
                    message(
                        f"{who}: {name} has a wrong shape for this input.",
                        expected=f"({axis_names}) = {expected}",
                        found=describe(value),
                        fix="the state has B on axis 1 with batch_first too" if self.batch_first else None,
                    )
                )
        return values if axes.batched else tuple(v.unsqueeze(1) for v in values)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"


class _Axes:
    """How the caller's axes stand: `sequence` is (T, B, I) or the PackedSequence; `restore` undoes it for
    outputs."""

    def __init__(self, layer: Any, input: Any):
        self.packed = isinstance(input, PackedSequence)
        self.leaf = input.data if self.packed else input
        who = type(layer).__name__
        torchscript.refuse_proxy(self.leaf)
        if not isinstance(self.leaf, Tensor):
            raise InputError(
                message(f"{who}: the input is no tensor and no PackedSequence.", found=describe(input))
            )
        if self.leaf.dim() not in ((2,) if self.packed else (2, 3)):
            order = "(B, T, I)" if layer.batch_first else "(T, B, I)"
            raise InputError(
                message(
                    f"{who}: the input has a wrong number of axes.",
                    expected=f"3-D {order}, or 2-D (T, I) for one sequence",
                    found=describe(self.leaf),
                )
            )
        self.batched = self.packed or input.dim() == 3
        self.turned = layer.batch_first and self.batched and not self.packed
        self.sequence: Any = input if self.packed else self.time_major(input)
        self.batch = int(input.batch_sizes[0]) if self.packed else self.sequence.shape[1]

    def time_major(self, t: Any) -> Any:
        if t is None:
            return None
        return t.transpose(0, 1) if self.turned else self.add_batch(t, 1)

    def add_batch(self, t: Any, dim: int) -> Any:
        return t if self.batched or t is None else torch.as_tensor(t).unsqueeze(dim)

    def restore(self, outputs: Any) -> Tensor | PackedSequence:
        if self.turned:
            return outputs.transpose(0, 1)
        return outputs if self.batched else outputs.squeeze(1)


def _map_sequence(function: Any, *sequences: Tensor | PackedSequence) -> Tensor | PackedSequence:
    """Apply a function of features to tensors, or to the data of PackedSequences of one shape."""
    first = sequences[0]
    if isinstance(first, PackedSequence):
        return first._replace(data=function(*(s.data for s in sequences)))
    return function(*sequences)
