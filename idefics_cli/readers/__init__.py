"""Inputs -> rows. No module here knows a model."""
