"""Measurements against the hardware and against other systems. Not installed; run from the repository's root."""
