"""The coloured-shapes world: its scenes, and the tokenizer, training and evaluation of the `demo` model."""
