"""What the program tells the shell."""

FAILED, USER_MISTAKE, INTERRUPTED, PIPE_CLOSED, TERMINATED = 1, 2, 130, 141, 143
