"""What `make demo` needs and no network gives: text, a tokenizer and a small language model of Python source."""
