"""The command line: flags in, one typed configuration out."""
