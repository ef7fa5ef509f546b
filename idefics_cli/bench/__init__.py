"""`idefics bench`: the same prompts through our engine and through transformers' own class, in one process.

`subjects.py` makes the model and the prompts, `compare.py` runs both sides, `floor.py` times the bare matrix products,
`memory.py` counts bytes and `report.py` puts the numbers together. Nothing here prints.
"""
