"""Chat templates that behave as those of well-known models, for tests of training rows."""

# Opens a turn with reasoning, removes it from turns before the last question, and knows functions.
REASONING = (
    "{%- set state = namespace(last_question=-1) -%}"
    "{%- for message in messages if message.role == 'user' -%}"
    "{%- set state.last_question = messages.index(message) -%}{%- endfor -%}"
    "{%- if tools -%}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}<|im_start|>assistant\n"
    "{%- set content = (message.content or '').split('</think>')[-1].lstrip('\n') -%}"
    "{%- if loop.index0 > state.last_question -%}"
    "{{ '\n<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' + content }}"
    "{%- else -%}{{ '\n' + content }}{%- endif -%}"
    "{%- for call in message.tool_calls or [] -%}"
    "{{ '\n<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- elif message.role == 'tool' -%}{{ '<|im_start|>user\n<tool_response>' + message.content }}"
    "{{ '</tool_response><|im_end|>\n' }}"
    "{%- else -%}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
# Shows functions in the first question, and refuses several calls at once.
HEADERS = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + ('ipython' if message.role == 'tool' else message.role) + '\n\n' }}"
    "{%- if tools and message.role == 'user' and messages[:loop.index0] | selectattr('role', 'eq', 'user') "
    "| list | length == 0 -%}{{ 'Functions: ' + (tools | tojson) + '\n\n' }}{%- endif -%}"
    "{%- if message.tool_calls -%}"
    "{%- if message.tool_calls | length != 1 -%}{{ raise_exception('Only one function call at once!') }}{%- endif -%}"
    "{{ {'name': message.tool_calls[0].function.name, 'parameters': message.tool_calls[0].function.arguments} "
    "| tojson }}"
    "{%- elif message.role == 'tool' -%}{{ message.content | tojson }}{%- else -%}{{ message.content | trim }}"
    "{%- endif -%}{{ '<|im_end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n\n' }}{%- endif -%}"
)
# Requires that questions and answers alternate, and has no text that opens an answer.
ALTERNATING = (
    "{%- for message in messages -%}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{%- if message.role == 'user' -%}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{%- else -%}{{ ' ' + message.content + eos_token }}{%- endif -%}{%- endfor -%}"
)
# Refuses system messages, and calls the assistant a model.
NO_SYSTEM = (
    "{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{{ (message.content | trim) + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>model\n' }}{%- endif -%}"
)
# Ends the whole text, but not each turn, with the end-of-text token.
END_OF_TEXT = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_start|>end\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- else -%}{{ eos_token }}{%- endif -%}"
)
# Opens an answer with reasoning for generation, and without it in a conversation.
THINKING_PROMPT = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n<think>\n' }}{%- endif -%}"
)
