"""The command line: a module a command, with `parse_arguments` for its options and `run` for its work and printing."""
