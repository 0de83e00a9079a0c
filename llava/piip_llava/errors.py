"""Errors that a user can put right."""


class InputError(ValueError):
    """Text, images or data do not fit together, or do not fit the model."""
