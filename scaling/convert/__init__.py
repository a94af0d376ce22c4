"""Checkpoints in and out: a folder an outside format, in it a file a family."""
