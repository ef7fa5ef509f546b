"""Prompts' tensors in, token sequences out. Knows no text and no files."""
