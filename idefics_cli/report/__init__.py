"""`idefics report`: one HTML page to look through a result file."""
