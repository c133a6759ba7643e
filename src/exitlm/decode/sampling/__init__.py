"""Sampling that depends on nobody else: noise of a counter, and the race of tokens that it decides."""
