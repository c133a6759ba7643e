"""Passes that other processes run: what goes between them and the engine."""
