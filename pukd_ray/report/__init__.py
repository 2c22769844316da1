"""What a run leaves for people: one self-contained page."""
