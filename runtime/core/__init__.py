"""Define errors, the command line, file access, and the arithmetic around the network."""
