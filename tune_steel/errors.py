"""The errors that people meet: one line that says what was wrong, what is allowed, what to do.

Everything else that is raised is a bug and keeps its traceback.
"""


class TuneSteelError(Exception):
    """Something the user can mend; the command line prints it as one line and exits with 2."""


class DataError(TuneSteelError):
    """A table that cannot be read, fetched or used."""


class SpaceError(TuneSteelError):
    """A search space or a trial's config with a mistake in it."""


class OptionError(TuneSteelError):
    """A command-line option with an impossible value."""


class RunError(TuneSteelError):
    """A run's folder that cannot be gone on with."""


class NonFiniteLossError(RuntimeError):
    """A training or validation loss is NaN or infinite; it fails the trial, not the search."""


class SearchFailedError(RuntimeError):
    """The search cannot go on, or every trial failed; the command line says why and exits 1."""
