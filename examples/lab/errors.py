"""The one way in which a run refuses to start or to go on."""


class LabError(Exception):
    """A user's mistake, told in one line that says what to do; the command exits with 2."""


class Interrupted(Exception):  # noqa: N818 - it is no error
    """A run stopped early on purpose; everything needed to go on is on disk."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step
