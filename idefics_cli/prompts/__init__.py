"""Once per prompt: templates, token ids and what becomes of the text. No module here knows a model."""
