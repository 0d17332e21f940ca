"""Trainers: one method in one file, on one wiring."""
