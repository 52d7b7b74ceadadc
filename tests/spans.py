"""Makes the executor run short spans of time, as it does where sequences are long: then everything crosses edges."""

from __future__ import annotations

from steploop.compiler import execute


def cut_time(patch, steps: int) -> None:
    """Every run in spans of so many steps, until `patch` (a monkeypatch) is undone."""
    for name in ("MEMORY_PER_SPAN", "MEMORY_PER_NATIVE_SPAN"):
        patch.setattr(execute, name, 0)
    patch.setattr(execute, "LEAST_STEPS", steps)
