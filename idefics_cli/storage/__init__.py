"""Files of bytes, local and remote, behind one interface."""
