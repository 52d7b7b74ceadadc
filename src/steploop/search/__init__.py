"""Search for label sequences with the model that was trained, and models that read their own labels."""

from .beam import Beam, beam
from .greedy import Greedy, greedy
from .hypotheses import Hypotheses
from .rescore import rescore
from .sample import Sample, SampleWithoutReplacement, sample
from .scheduled_sampling import ScheduledSampling
from .started import Started

__all__ = [
    "Beam",
    "Greedy",
    "Hypotheses",
    "Sample",
    "SampleWithoutReplacement",
    "ScheduledSampling",
    "Started",
    "beam",
    "greedy",
    "rescore",
    "sample",
]
