"""Continuations of a text by a language model in which a trained crosscoder stands in for layers, or edits features."""
