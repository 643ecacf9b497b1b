"""What came out: exact figures with their uncertainty, the pictures that went wrong, and a report to show."""
