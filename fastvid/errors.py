"""Expected errors: the command line shows them as one line, without a traceback."""


class InputError(ValueError):
    """An error that the user can correct. Its message is one line: what was found, where, and the remedy."""


class Interrupted(Exception):
    """A signal stopped the training after everything was saved. The message says how to resume.

    number: the number of the signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number
