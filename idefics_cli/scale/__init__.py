"""Runs of many processes, on one machine or many: their input is cut into numbered units."""
