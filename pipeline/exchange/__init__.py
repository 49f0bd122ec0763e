"""Trained crosscoders in the files of other libraries."""
