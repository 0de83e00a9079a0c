"""Errors that a user can put right."""

from piip.errors import own_message


class InputError(ValueError):
    """Text, images or data do not fit together, or do not fit the model."""

    def __init__(self, message: str) -> None:
        super().__init__(own_message(type(self), message))
