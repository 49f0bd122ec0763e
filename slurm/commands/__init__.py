"""The `crosscoder` command line."""
