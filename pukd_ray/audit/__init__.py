"""What a run is worth by the eyes of a person: a small labelled sample, and figures that assume nothing."""
