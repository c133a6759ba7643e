"""Decoding by many processes: stages of a pipeline, what they say to each other, and how they are kept alive."""
