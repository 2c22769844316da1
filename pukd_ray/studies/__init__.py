"""Experiments on data of known truth: what the claims in docs/ rest on."""
