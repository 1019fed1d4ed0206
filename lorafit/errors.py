"""Every error that lorafit raises on purpose. One line each: what is wrong; what there is; what to do.

The command line prints the message alone and exits with `exit_code`: 2 for something the user can mend, 1 for our own faults.
"""


class LorafitError(Exception):
    """The root of the tree. Raised itself only for faults of lorafit's own."""

    exit_code = 1


class UserError(LorafitError):
    """Something the user can mend."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, misspelt or out of range."""


class DataError(UserError):
    """A data file can't be used as it is."""


class ModelError(UserError):
    """A base model can't be found, read or adapted."""


class AdapterError(UserError):
    """An adapter doesn't fit its base, or its files are damaged."""


class RunError(UserError):
    """A run folder can't be created, opened or resumed."""


class OutOfMemory(UserError):
    """There isn't enough memory, however small the pieces. `what` is the message without what to `do` about it."""

    def __init__(self, what: str, do: str = "") -> None:
        super().__init__(f"{what}; {do}" if do else what)
        self.what = what


class MissingExtra(UserError):
    """An optional dependency isn't installed; the message holds the exact `pip install`."""
