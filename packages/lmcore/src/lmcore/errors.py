"""The one exception that is the user's to mend."""


class UserError(Exception):
    """Input that cannot be used: the message names the file, tensor or line and says what to do.

    A command prints it as one line on stderr and exits 2 (`lmcore.cli`); anything else that escapes is a bug.
    """
