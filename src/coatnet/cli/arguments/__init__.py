"""What each verb of the command line accepts, its help, and the one line that answers a mistake."""
