"""Errors that a user can mend: the message says what was expected, what came and what to do."""


class InputError(ValueError):
    """Something the caller passed cannot be used; nothing has been written."""


class OutputError(OSError):
    """A place to write cannot be used; nothing has been written."""


class InvariantError(RuntimeError):
    """What was built is not what was asked for: a defect here; nothing has been written."""
