"""Attention over a memory: Steps that a decoder's step calls, `context, weights = attention(query, memory=...)`.

One file each: AdditiveAttention, DotAttention, GeneralAttention, MultiHeadAttention, LocationSensitiveAttention,
MonotonicAttention, GaussianMixtureAttention.  DecoderWithAttention puts one together with a cell.
"""

from .additive import AdditiveAttention
from .base import Attention
from .decoder import DecoderWithAttention
from .dot import DotAttention
from .gaussian_mixture import GaussianMixtureAttention
from .general import GeneralAttention
from .location_sensitive import LocationSensitiveAttention
from .monotonic import MonotonicAttention
from .multi_head import MultiHeadAttention

__all__ = [
    "AdditiveAttention",
    "Attention",
    "DecoderWithAttention",
    "DotAttention",
    "GaussianMixtureAttention",
    "GeneralAttention",
    "LocationSensitiveAttention",
    "MonotonicAttention",
    "MultiHeadAttention",
]
