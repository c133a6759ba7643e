"""Short chat templates in the manner of each family, and tokenizers whose special tokens are that family's.

A template is what a family's model would be trained on, with its rules: what it shows, and what it refuses.
"""

import functools
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from exitlm.weights.checkpoint import chat_text

# Qwen 2.5 and later: ChatML, tools in the system's message, results in the user's.
QWEN = """
{%- if tools %}
{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
{{- 'Tools:\n<tools>' }}
{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\n</tools>\nCall as in\n<tool_call>\n{"name": NAME, "arguments": ARGUMENTS}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
{%- elif message.role == 'assistant' and message.tool_calls %}
{{- '<|im_start|>assistant' }}
{%- if message.content %}{{- '\n' + message.content }}{%- endif %}
{%- for tool_call in message.tool_calls %}
{%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
{{- '\n<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
{{- tool_call.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

# Hermes 2 Pro: needs descriptions, and the names of the tools that gave results.
HERMES_2 = """
{%- if tools %}
{{- '<|im_start|>system\n<tools>' }}
{%- for tool in tools %}
{{- tool.function.name + ': ' + tool.function.description + ' ' + (tool.function.parameters | tojson) }}
{%- endfor %}
{{- '</tools> <tool_call>\n{"arguments": ARGUMENTS, "name": NAME}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if not message.name is defined %}{{- raise_exception('a result needs a name') }}{%- endif %}
{{- '<|im_start|>tool\n<tool_response>\n{"name": "' + message.name + '", "content": ' }}
{{- message.content | tojson }}{{- '}\n</tool_response><|im_end|>\n' }}
{%- elif message.tool_calls is defined %}
{{- '<|im_start|>assistant' }}
{%- for tool_call in message.tool_calls %}
{{- '\n<tool_call>\n{"arguments": ' }}{{- tool_call.function.arguments | tojson }}
{{- ', "name": "' + tool_call.function.name + '"}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

# Llama 3.1 to 3.3: tools in the first message of the user, one call in a message, results from ipython.
LLAMA_3 = """
{{- '<|begin_of_text|>' }}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
{%- if 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at once') }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
{%- elif message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}{{- {'output': message.content} | tojson }}{{- '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{%- if loop.first and tools is not none %}
{{- 'Answer with {"name": NAME, "parameters": ARGUMENTS} to call one of\n' }}
{%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}
{%- endif %}
{{- message.content + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""

# Mistral 7B v0.3 and Nemo: a list of calls with ids of nine letters and digits.
MISTRAL_3 = """
{{- '<s>' }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools is not none and loop.last %}{{- '[AVAILABLE_TOOLS]' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST]' + message.content + '[/INST]' }}
{%- elif message.tool_calls is defined and message.tool_calls is not none %}
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}
{%- set written = call.function | tojson %}
{{- written[:-1] + ', "id": "' + call.id + '"}' }}{{- ', ' if not loop.last else ']</s>' }}
{%- endfor %}
{%- elif message.role == 'tool' %}
{%- if message.tool_call_id | length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}
{{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- elif message.role == 'assistant' %}
{{- ' ' + message.content + '</s>' }}
{%- else %}
{{- '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
{%- endif %}
{%- endfor %}
"""

# Ministral 3 and Devstral: a name and its arguments behind a marker each.
MISTRAL_13 = """
{{- '<s>' }}
{%- if tools %}{{- '[AVAILABLE_TOOLS]' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '[INST]' + message.content + '[/INST]' }}
{%- elif message.role == 'assistant' %}
{{- message.content }}
{%- for tool in message.tool_calls or [] %}
{%- set arguments = tool.function.arguments %}
{%- if arguments is not string %}{%- set arguments = arguments | tojson %}{%- endif %}
{{- '[TOOL_CALLS]' + tool.function.name + '[ARGS]' + arguments }}
{%- endfor %}
{{- '</s>' }}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
{%- else %}
{{- '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
{%- endif %}
{%- endfor %}
"""

# SmolLM2's, and that of many others: no tools, and roles that alternate.
CHATML = """
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant'] %}{{- raise_exception('unknown role') }}{%- endif %}
{%- if not loop.first and messages[loop.index0 - 1].role == message.role %}
{{- raise_exception('roles must alternate') }}
{%- endif %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

# What decoding skips in each family's tokenizer, and what it shows: Qwen's markers are tokens, but not special ones.
SPECIAL = {
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "smollm": ("<|im_start|>", "<|im_end|>"),
    "llama": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
    "mistral": (
        *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"),
        *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[ARGS]", "[CALL_ID]"),
    ),
}
SHOWN = {"qwen": ("<tool_call>", "</tool_call>"), "smollm": (), "llama": (), "mistral": ()}
ENDS = {"qwen": "<|im_end|>", "smollm": "<|im_end|>", "llama": "<|eot_id|>", "mistral": "</s>"}
FAMILIES = {
    QWEN: "qwen", HERMES_2: "qwen", CHATML: "smollm", LLAMA_3: "llama", MISTRAL_3: "mistral", MISTRAL_13: "mistral",
}  # fmt: skip
# The token of each byte: as in GPT-2, bytes that print stand for themselves and the others for letters from 256 on.
_PRINT = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINT]
LETTERS = {byte: chr(byte if byte in _PRINT else 256 + _OTHERS.index(byte)) for byte in range(256)}


@functools.cache
def tokenizer_of(template: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of one token a byte (ids below 256), the family's added tokens, and its template."""
    family = FAMILIES[template]
    core = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in LETTERS.items()}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL[family]])
    core.add_tokens([AddedToken(token, special=False) for token in SHOWN[family]])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=ENDS[family])
    made.chat_template = template
    return made


def prompt(template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
    """The text of a conversation, up to where the answer begins."""
    return chat_text(tokenizer_of(template), messages, answer=True, remedy="give others", tools=tools)
