"""The commands of the command line, one module a panel of its help."""
