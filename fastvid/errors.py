"""Expected errors: the command line shows them as one line, without a traceback."""


class InputError(ValueError):
    """An error that the user can mend. Its message is one line: what was found, where, and the remedy."""


class Interrupted(Exception):
    """The user stopped the training, and everything is saved. The message says how to go on; `number` is the signal."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number
