"""Errors that a user can fix."""


class InputError(Exception):
    """Invalid input: the message names it, says what was expected and found, and what to do."""


class AbsentError(InputError):
    """A local file is not there; another machine of a cluster may see it."""


class StoreError(InputError):
    """A remote store cannot be reached, or refuses us; none of its files is at fault."""
