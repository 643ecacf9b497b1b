"""What came out: exact figures with their uncertainty, the images that went wrong, and a report to show."""
