"""Trained checkpoints, their cards, and the data sets that are programs."""
