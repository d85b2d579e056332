"""Chat templates of published models, which the tests give to tokenizers of their own."""

START, END = "<start_of_turn>", "<end_of_turn>"
TEMPLATE = """{{ bos_token }}{% for message in messages -%}
{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
"""Gemma 3's own, without images, system prompts and its checks."""

CHAT = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}\
{% if message.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}\
{{ message.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
{% if enable_thinking is defined and enable_thinking is false %}\
{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
"""Qwen3's, without tools: thinking is on unless it is switched off."""

QWEN2 = """{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Qwen, created by \
Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}{% endif %}\
{% for message in messages %}\
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""Qwen2.5's, without tools: it has a system turn."""

LLAMA = """{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' }}\
{{ strftime_now('%d %b %Y') + '\n\n<|eot_id|>' }}{% for message in messages %}\
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim }}\
{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
"""Llama 3.2's, without tools: its system turn names the day."""

PHI = """{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}\
{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}\
{% else %}{{ eos_token }}{% endif %}"""
TURNS = """{{ bos_token }}{% for message in messages %}{{ '<|turn>' }}\
{{ 'model' if message.role == 'assistant' else message.role }}{{ '\n' + message.content | trim }}\
{{ '<turn|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"""
INST = """{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}\
{{ '[INST] ' + message.content + '[/INST]' }}{% else %}{{ ' ' + message.content + eos_token }}\
{% endif %}{% endfor %}"""

HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
TEMPLATES = {  # template, its tokens, what stands before and behind a prompt, end of an answer
    "Gemma 3": (TEMPLATE, [START, END], f"{START}user\n", f"{END}\n{START}model\n", END),
    "Gemma 4": (
        *(TURNS, ["<|turn>", "<turn|>"], "<|turn>user\n", "<turn|>\n<|turn>model\n"),
        "<turn|>",
    ),
    "Qwen3": (
        *(CHAT, ["<|im_start|>", "<|im_end|>"], "<|im_start|>user\n"),
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "Qwen2.5": (
        *(QWEN2, ["<|im_start|>", "<|im_end|>"]),
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "Llama 3.2": (
        *(LLAMA, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
        HEAD.format("system") + "Today Date: 26 Jul 2024\n\n<|eot_id|>" + HEAD.format("user"),
        "<|eot_id|>" + HEAD.format("assistant"),
        "<|eot_id|>",
    ),
    "Phi 4": (
        *(PHI, ["<|user|>", "<|end|>", "<|assistant|>"], "<|user|>", "<|end|><|assistant|>"),
        "<|end|>",
    ),
    "Mistral": (INST, ["[INST]", "[/INST]"], "[INST] ", "[/INST]", None),
    "base model": (None, [], "", "", None),
}
"""Source: chat_template of these models on the hub, without images, tools and checks."""
