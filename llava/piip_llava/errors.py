"""Errors that a user can put right."""


class InputError(ValueError):
    """Text, images or data do not fit together, or do not fit the model."""

    def __init__(self, message: str) -> None:
        # torch hands an error of a data-loading process on as a whole traceback, which ends in the message.
        own = message.rstrip().rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2]
        super().__init__(own)
