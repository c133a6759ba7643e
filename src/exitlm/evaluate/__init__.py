"""How fast and how faithful: the figures of early-exit decoding, drawn."""
