"""The page of `crosscoder report`: what one or several trained crosscoders are, how good they are, and their features."""
