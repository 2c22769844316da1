"""Run after run, each disturbed on purpose at a seeded moment, and held against one that nothing disturbed."""

import ray  # noqa: F401  # brings psutil, which can be imported from now on
