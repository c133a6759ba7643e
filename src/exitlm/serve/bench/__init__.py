"""A load generator for servers with OpenAI's interface: ``exitlm bench-serve``.

``asks.py`` makes the requests, ``load.py`` sends them in time, ``client.py`` reads one answer, ``figures.py`` turns
what was read into percentiles. It is a client: nothing of the server is imported.
"""
