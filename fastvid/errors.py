"""The two ways a run ends early that are no bug of fastvid."""


class InputError(ValueError):
    """Something the user can mend. The message is one line: what was found, where, and the remedy."""


class Interrupted(Exception):
    """The user asked to stop; everything was saved. The message says how to go on."""
