"""Hub id, local folder or `demo` -> network and tokenizer: where a model is, whether it is whole, and how it is loaded.

A missing or damaged file is reported in one line before a weight is read. Nothing from a checkpoint is ever executed:
weights are safetensors unless the caller allows pickles (then `weights_only`), and `auto_map` is ignored. Nothing here
knows rows or decoding.
"""
