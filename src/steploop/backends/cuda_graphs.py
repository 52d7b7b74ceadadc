"""The eager loop launched as CUDA graphs: runs of 64, 16 or 4 steps are recorded, and then launched as one.

A run is recorded when it comes for the second time with the same shapes. Everything else runs as in `eager`: the
first time, the steps left over, and rows that change from step to step.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..compiler.ir.graph import LoopProgram
from ..compiler.recording import CudaRecorder, Recording, reasons_against, settings, types_of
from . import eager

STEPS = (64, 16, 4)  # of one recording
KEPT = 12  # recordings of one loop, each with memory of its own


def takes(loop: LoopProgram) -> bool:
    """Whether a loop runs on a CUDA device and can be recorded."""
    devices = {n.meta["val"].device for n in loop.prevs if isinstance(n.meta.get("val"), Tensor)}
    return len(devices) == 1 and devices.pop().type == "cuda" and not reasons_against(loop.calls)


def recorded(loop: LoopProgram) -> Runner:
    return Runner(loop, CudaRecorder(loop.prevs[0].meta["val"].device))


class Runner(eager.Runner):
    """An eager loop whose runs of several steps are recorded.

    failed: why it records no more, "" as long as it does.
    """

    def __init__(self, loop: LoopProgram, recorder: Any):
        super().__init__(loop)
        self.recorder = recorder
        self.recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self.failed = ""
        self._seen: set[Hashable] = set()
        self._lock = threading.Lock()  # a recording has one set of inputs
        self._place: Any = None

    def _steps(self, run: eager.Run, sizes: dict[str, int], kept: list[list[Tensor | eager.Joined]]) -> list[Tensor]:
        few = run.count < STEPS[-1] or run.rows == 0
        if few or self.failed or not self.recorder.possible() or not self._lock.acquire(blocking=False):
            return super()._steps(run, sizes, kept)
        try:
            place = self.recorder.place()
            if self._place is not None and place != self._place:
                self.recorder.follow(self._place)
            self._place = place
            return self._in_parts(run, sizes, kept)
        finally:
            self._lock.release()

    def _in_parts(
        self, run: eager.Run, sizes: dict[str, int], kept: list[list[Tensor | eager.Joined]]
    ) -> list[Tensor]:
        fixed = [*run.constants, *run.back]
        kind = (run.down, run.marks is not None, run.rows, tuple(sorted(sizes.items())), types_of(fixed), settings())
        loaded: set[Hashable] = set()
        begin = 0
        while begin < run.count:
            count = next((n for n in STEPS if n <= run.count - begin), run.count - begin)
            part = run if count == run.count else run.part(begin, count)
            moving = _moving(part)
            key = (count, kind, types_of(moving))
            recording = self._recording(key, part, fixed, sizes) if count in STEPS else None
            if recording is None:
                run.states = super()._steps(part, sizes, kept)
            else:
                if key not in loaded:
                    recording.load(fixed)
                    loaded.add(key)
                recording.load(moving, len(fixed))
                recording.launch()
                run.states = self._given(recording, kept)
            begin += count
        return run.states

    def _recording(
        self, key: Hashable, part: eager.Run, fixed: list[Tensor], sizes: dict[str, int]
    ) -> Recording | None:
        found = self.recordings.get(key)
        if found is not None:
            self.recordings.move_to_end(key)
            return found
        if key not in self._seen or self.failed:
            self._seen.add(key)
            return None
        if len(self.recordings) >= KEPT:
            self.recorder.finish()
            self.recordings.popitem(last=False)
        try:
            found = Recording(self.recorder, self._function(part, sizes), [*fixed, *_moving(part)])
        except Exception as error:  # what can't be recorded can still be run
            self.failed = f"{type(error).__name__}: {error}"
            return None
        self.recordings[key] = found
        return found

    def _function(self, like: eager.Run, sizes: dict[str, int]) -> Callable[[list[Tensor]], list[Tensor]]:
        """The steps of a run as a function of the tensors [*constants, *back, *states, *packed, marks]: it gives the
        states after them and the kept values, joined."""
        lengths = [len(group) for group in (like.constants, like.back, like.states, like.packed)]
        like = replace(like, states=[], constants=[], packed=[], back=[], hits=[True] * like.count)

        def function(inputs: list[Tensor]) -> list[Tensor]:
            rest = iter(inputs)
            constants, back, states, packed = ([next(rest) for _ in range(n)] for n in lengths)
            marks = next(rest) if like.marks is not None else None
            run = replace(like, states=states, constants=constants, packed=packed, back=back, marks=marks)
            kept: list[list[Tensor | eager.Joined]] = [[] for _ in self.loop.kept]
            after = eager.Runner._steps(self, run, sizes, kept)
            return [*after, *(self.join(k, node, run.down) for k, node in zip(kept, self.loop.kept))]

        return function

    def _given(self, recording: Recording, kept: list[list[Tensor | eager.Joined]]) -> list[Tensor]:
        results = recording.give()
        states = len(self.loop.prevs)
        for values, joined in zip(kept, results[states:], strict=True):
            values.append(eager.Joined(joined))
        return results[:states]


def _moving(run: eager.Run) -> list[Tensor]:
    """What every launch reads anew."""
    return [*run.states, *run.packed, *([] if run.marks is None else [run.marks])]
