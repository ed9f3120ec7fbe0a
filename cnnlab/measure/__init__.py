"""Honest measurements: timers, comparisons, peaks, profiles, the ladder, scaling laws."""
