"""Serving: OpenAI-compatible HTTP, the playground page, metrics, and a load generator."""
