"""The one exception that is the user's to mend."""


class UserError(Exception):
    """Input that cannot be used: the message names the file, tensor or line and says what to do (see `lmcore.cli.main`)."""
