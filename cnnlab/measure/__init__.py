"""Measuring speed: one timer, comparisons, peaks, profiles, the ladder, scaling laws."""
