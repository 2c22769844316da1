"""The student as files that run on devices: formats, each checked against PyTorch."""
