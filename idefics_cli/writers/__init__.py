"""Rows -> files. No module here knows a model."""
