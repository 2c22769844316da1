"""Pictures in: sources -> units -> rows; encoded bytes -> pixels or a reason."""
