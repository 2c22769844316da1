"""Which corpus images belong to the teacher's task: PU risk, prior, calibration, scoring, rules."""
