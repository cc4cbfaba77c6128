"""The emulator's errors."""


class EmulationError(Exception):
    """The program did what a GPU would not allow or define, or what the emulator does not know."""
