"""JSON lines to token ids: reading text in bounded memory, tokenizing it exactly, writing it in parts that a kill can't tear."""
