"""How well a crosscoder stands in for a language model's activations on held-out text: measurements, tables, figures."""
