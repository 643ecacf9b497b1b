"""What the program needs of the machine: atomic files and folders, a cache folder, progress bars, hardware, checks."""
