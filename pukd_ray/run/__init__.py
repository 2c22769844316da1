"""The run folder: what a run leaves on storage and which stages write it."""
