"""YAML to typed configuration. Imports neither torch nor transformers, so a login node reads configs in milliseconds."""
