"""What the program asks of the machine, written once: atomic files and folders, progress bars, hardware."""
