"""Mistakes of the person at the keyboard, told apart from mistakes of ours."""


class UserError(ValueError):
    """One line: what was given, what is wrong with it, what would be right.

    The command line prints it and exits with code 2; a traceback is for our own mistakes.
    """
