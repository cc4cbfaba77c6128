"""What the emulator raises."""


class EmulationError(Exception):
    """The program did what a GPU would not allow or define, or what the emulator does not know."""
