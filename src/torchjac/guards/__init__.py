"""Guards: whether everything that a function read is as it was."""
