"""What each feature of a trained crosscoder is: when it fires, where, and what it writes."""
