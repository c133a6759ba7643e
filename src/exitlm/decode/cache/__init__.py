"""Where keys, values and waiting hidden states lie, and who holds what."""
