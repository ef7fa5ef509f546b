"""How right the texts of a result file are."""
