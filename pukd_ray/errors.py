"""The one exception for runs that cannot go on for a reason their user can mend."""


class RunError(RuntimeError):
    """The run stops here; the message says what is wrong and what to do."""
