"""The one error that a user of the pipeline can cause."""


class UserError(ValueError):
    """Something the user can mend. The message says what was found, what was expected and what to do.

    The command line prints the message alone, without a traceback, and exits with 1.
    """
