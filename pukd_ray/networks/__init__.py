"""Teachers and students by name, their multi-scale features, and the attention head."""
