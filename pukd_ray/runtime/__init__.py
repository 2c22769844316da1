"""The machinery of a run: Ray, Ray Train, devices, clocks, and what a person and Prometheus see. No images."""
