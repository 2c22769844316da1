"""What stops a run for a reason that its user can mend."""


class RunError(RuntimeError):
    """The run stops here; the message says what is wrong and what to do."""


class PlaceError(RunError):
    """Storage refuses or fails: nothing is known about the images in it, which stay to be done."""


class MissingError(PlaceError):
    """A file is not where it was planned to be."""
