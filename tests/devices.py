"""On which device a test makes its tensors: `pytest --device cpu|cuda|pretended`.

Without the option tests run on the CPU, and those of the folders in `EVERY_DEVICE` once more on CUDA where that is
there. A test needs no word about devices: while it runs on another device, `MakesOn` makes what it makes there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors

import steploop

EVERY_DEVICE = ("oracle",)
ON_THE_CPU = ("test_forward_mode", "test_legacy_vs_tf")  # what they compare with is made there as they are loaded
_LIBRARY = str(Path(steploop.__file__).parent)
_CONSTRUCTORS = ("__init__", "reset_parameters")
_here = torch.device("cpu")


def here() -> torch.device:
    """The device of the test that runs."""
    return _here


def compiled() -> str:
    """The backend that "auto" takes here for a step which the native one can take."""
    return "cpu" if _here.type == "cpu" else "eager"


def moved(value: Any) -> Any:
    """What a test module made when it was loaded, on the device of the test that runs."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(_here), value)


def skip_on(*kinds: str, why: str) -> None:
    """Skips the test that runs, if it runs on a device of one of these kinds."""
    if _here.type in kinds:
        pytest.skip(why)


def available(asked: str | None) -> list[str]:
    """The devices that tests run on. asked: the option."""
    if asked == "pretended":
        import pretended_device

        return [pretended_device.install()]
    if asked is not None:
        return [asked]
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


class MakesOn(TorchFunctionMode):
    """Makes tensors whose device nobody names on `device`, as `torch.set_default_device` does, with two differences.

    The library itself gets no help but in constructors of modules: where it forgets `device=`, its tensor is made on
    the CPU, as it would be for a user whose default device is the CPU. And numbers of a generator of the CPU are drawn
    there and moved, so that a test draws the same numbers on every device.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = torch.device(device)
        self.makers = _device_constructors()

    def __enter__(self) -> Any:
        global _here
        self.before, _here = _here, self.device
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        global _here
        _here = self.before
        return super().__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in self.makers or kwargs.get("device") is not None or self._by_the_library():
            return function(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device != self.device:
            return function(*args, **kwargs).to(self.device)
        return function(*args, **{**kwargs, "device": self.device})

    @staticmethod
    def _by_the_library() -> bool:
        frame = sys._getframe(2)
        while frame.f_code.co_name == "__torch_function__":  # of another mode, which stands between
            frame = frame.f_back
        caller = frame.f_code
        return caller.co_filename.startswith(_LIBRARY) and caller.co_name not in _CONSTRUCTORS
