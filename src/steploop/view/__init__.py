"""What a person sees: pages and pictures."""

from .alignment import alignment

__all__ = ["alignment"]
