"""A language model's activations: on disk or streamed, through the same iterator."""
