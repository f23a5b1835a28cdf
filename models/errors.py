"""The two kinds of error that end a command with one line instead of a traceback."""


class UserError(ValueError):
    """A mistake of the user. The message is one line that says what would be right; status 2."""


class DamagedFile(UserError):
    """A file of torch.save that cannot be read."""


class RunError(RuntimeError):
    """A failure on the way, such as a full disk or a loss that is NaN; exit status 1."""
