"""What a training will take before it is paid for: memory, time, and the command that starts it."""
