"""Tool calls of a chat, as text: what a request offers, how a prompt shows it, and how the answer is read.

Pure: text and plain data in, records out. It knows neither HTTP nor the engine. In the order of a request:

1. :func:`~exitlm.serve.tools.offer.read_offer` checks ``tools``, ``tool_choice`` and ``parallel_tool_calls``.
2. :func:`~exitlm.serve.tools.formats.detect` names the :class:`~exitlm.serve.tools.formats.Format` that a model writes
   calls in, from its chat template (:func:`~exitlm.serve.tools.rendering.template_of`).
3. :func:`~exitlm.serve.tools.rendering.render` puts the conversation into the shape that the template takes.
4. :meth:`Format.grammar <exitlm.serve.tools.formats.Format.grammar>` forces a call where the offer does
   (``required``, or a named tool). ``auto`` is free text.
5. A :class:`~exitlm.serve.tools.parser.Parser` turns the answer, piece by piece, into
   :data:`~exitlm.serve.tools.deltas.Delta`; :func:`~exitlm.serve.tools.deltas.collect` joins them to one message.

**What a parser must be fed**: the text with the markers of its format in it. Some markers are special tokens, which
decoding skips (Mistral's all, Llama's ``<|python_tag|>``; Qwen's and Hermes's are not). So feed, for each token,
``token.text + spelled.get(token.id, "")``, where :func:`~exitlm.serve.tools.formats.marker_ids` gives ``spelled``.
"""
