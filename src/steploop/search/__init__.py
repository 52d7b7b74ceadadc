"""Models that read their own labels."""

from .scheduled_sampling import ScheduledSampling

__all__ = ["ScheduledSampling"]
