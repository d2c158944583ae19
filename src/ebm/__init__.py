"""Energy-based models: energies, objectives, samplers, training and metrics in plain PyTorch."""


class EBMError(Exception):
    """What went wrong, in one line that a user can act on. Commands print it without a
    traceback."""
