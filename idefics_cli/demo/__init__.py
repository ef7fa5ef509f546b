"""The coloured-shapes world: its scenes, the `demo` model and how well it sees."""
