"""Mistakes of the person at the keyboard, told apart from mistakes of ours."""


class UserError(ValueError):
    """One line: what was given, what is wrong with it, what would be right.

    The command line prints it and exits with code 2; a traceback is for our own mistakes.
    """


def first_line(error: BaseException) -> str:
    """What an error of others says, as far as one line goes; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
