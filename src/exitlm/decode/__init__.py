"""Decoding with exits: cache, rules, the pending-token step, acceptance, and the engine (see ``engine``)."""
