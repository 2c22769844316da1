"""Bundled Fashion-MNIST sample, teacher weights and config of the demo (package data)."""
