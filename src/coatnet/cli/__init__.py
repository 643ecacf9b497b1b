"""The command line. Each command is one module with `parse_arguments`, its options, and `run`, its work and printing."""
