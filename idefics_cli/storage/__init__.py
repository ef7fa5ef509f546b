"""Files, local and remote, behind one interface."""
