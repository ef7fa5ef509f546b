"""Once per run: resume, load, run, publish."""
