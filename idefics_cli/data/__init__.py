"""Where pictures and rows come from and where rows go: no module here knows a model."""
