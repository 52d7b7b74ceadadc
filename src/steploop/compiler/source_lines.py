"""The user's source line of every node that is traced, and what of a call the graph will not show."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, fx
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import StepError, describe
from .inplace import changes_in_place, writes_real_tensor
from .recorder import Recorder, tensors_read
from .refusals import asks_for_gradient, is_user_file, own_operations
from .sources import line_of_frame
from .traced_as import TRACED_AS, by_tensor


def _user_line() -> str:
    return line_of_frame(sys._getframe(2))


class Lines(TorchFunctionMode):
    """Writes the user's source line on every node that is traced, those of the backward pass included.

    A torch call tags the nodes that it made. For the backward pass every autograd node remembers the line of
    the call that made it, and tags the nodes that are traced while it runs.
    """

    belongs_to_a_trace = True

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._tail: fx.Node | None = None
        self._line = ""
        self.refused: StepError | None = None
        self.failed = ""  # the call that torch could not do

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        line = _user_line()
        self._note(function, args)
        if writes_real_tensor(function, args, kwargs or {}):
            # Kept as well: for `x += 1` Python takes a TypeError to mean that it should try x = x + 1.
            self.refused = self.refused or changes_in_place(line)
            raise self.refused
        odd = next((a for a in (*args, *(kwargs or {}).values()) if _is_of_a_user(a)), None)
        if odd is not None:
            self.refused = self.refused or own_operations(type(odd), line)
            raise self.refused
        self._tag(self._line)
        function = by_tensor(function, args, kwargs) or TRACED_AS.get(function, function)
        self._recorder.pause()
        try:
            with _disable_current_modes() if self._reads_content(function, args) else nullcontext():
                result = function(*args, **(kwargs or {}))
        except Exception:
            self.failed = self.failed or _called(function, args, kwargs or {})
            raise
        finally:
            self._recorder.go_on()
        self._tag(line)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                _metadata(tensor.grad_fn).setdefault("line", line)
        return result

    def _note(self, function: Any, args: tuple[Any, ...]) -> None:
        """What of a call the captured graph will not show."""
        self._recorder.runs(function)
        if getattr(function, "__self__", None) is Tensor.requires_grad and isinstance(args[0], FunctionalTensor):
            frame = sys._getframe(2)
            if is_user_file(frame.f_code.co_filename):
                self.refused = self.refused or asks_for_gradient(frame.f_code.co_filename, frame.f_lineno)
                raise self.refused

    def _reads_content(self, function: Any, args: tuple[Any, ...]) -> bool:
        """Whether a call makes Python numbers of tensors of the user's alone; they are noted, and looked at later."""
        tensors = tensors_read(function, args)
        for tensor in tensors:
            self._recorder.read(tensor)
        return bool(tensors) and len(tensors) == sum(isinstance(a, Tensor) for a in args)

    def _tag(self, line: str, graph: fx.Graph | None = None) -> None:
        """Gives every node made since the last call its line."""
        if graph is None:
            mode = get_proxy_mode()
            if mode is None:
                return
            graph = mode.tracer.graph
        node = graph._root.prev
        newest = node
        while node is not self._tail and node is not graph._root:
            node.meta.setdefault("line", line)
            node = node.prev
        self._tail = newest

    def follow(self, results: list[Tensor]) -> None:
        """Prepares for the backward pass of these results."""
        seen: set[Any] = set()
        stack = [(r.grad_fn, "") for r in results if r.grad_fn is not None]
        while stack:
            function, inherited = stack.pop()
            if function in seen:
                continue
            seen.add(function)
            line = _metadata(function).setdefault("line", inherited)
            function.register_prehook(lambda _, line=line: self._enter(line))
            stack.extend((f, line) for f, _ in function.next_functions if f is not None)

    def _enter(self, line: str) -> None:
        self._tag(self._line)
        self._line = line

    @property
    def of_gradient(self) -> tuple[str, int] | None:
        """The file and the line of what the running backward pass is the gradient of."""
        places = getattr(self._line, "places", ())
        return places[0] if places else None

    def settle(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            node.meta.setdefault("line", self._line)


def _metadata(function: Any) -> dict[str, Any]:
    """What may be noted on an autograd node. (torch's stubs call it a method.)"""
    return function.metadata


def _is_of_a_user(value: Any) -> bool:
    """Whether a tensor is of a subclass of the user's, which no tracer of torch takes."""
    return isinstance(value, Tensor) and type(value).__module__.split(".")[0] != "torch"


def _called(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """A torch call as messages show it: 'mm((2, 4) float32, (5, 4) float32)'."""
    try:
        flat = [a for arg in (*args, *kwargs.values()) for a in (arg if isinstance(arg, (list, tuple)) else [arg])]
        tensors = ", ".join(describe(a) for a in flat if isinstance(a, Tensor))
        return f"{getattr(function, '__name__', 'a call')}({tensors})" if tensors else ""
    except Exception:
        return ""  # an argument that can't even be described
