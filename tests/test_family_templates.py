"""Chat templates of every family: what is repaired in them, and whether ours write what TRL's do.

What is trained with them is in tests/slow/test_families.py.
"""

import json
from importlib.resources import files

import pytest
from families import FAMILIES, NOT_TRAINABLE, make_processor

from utils import chat, families
from utils.settings import ROOT

REPAIRED = {  # question and answer as the family's template writes them, and as we train and ask
    "Idefics2": ("User:<image>q<end_of_utterance>\nAssistant: a<end_of_utterance>\n", "<s>{}"),
    "LLaVA 1.5": ("USER: <image>\nq ASSISTANT: a ", "<s>{}</s>"),
    "LLaVA-NeXT": ("[INST] <image>\nq [/INST] a</s> ", "<s>{}"),
    "LLaVA-OneVision": (
        "<|im_start|>user <image>\nq<|im_end|><|im_start|>assistant \na<|im_end|>",
        "{}",
    ),
}
DOCUMENTED = [name for name, family in FAMILIES.items() if family.documented]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_is_repaired_only_where_it_must_be(name):
    processor = make_processor(FAMILIES[name])
    question = chat.prompt_messages("q")
    messages = question + chat.answer_messages("a")
    before = processor.apply_chat_template(messages, tokenize=False)
    families.complete_template(processor)
    if name not in REPAIRED:
        assert processor.chat_template == FAMILIES[name].template
        return
    expected, around = REPAIRED[name]
    assert before == expected
    after = processor.apply_chat_template(messages, tokenize=False)
    assert after == around.format(before.replace("assistant \n", "assistant\n"))
    prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert after.startswith(prompt)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_our_template_writes_what_the_family_s_own_does(name):
    family = FAMILIES[name]
    processor = make_processor(family)
    original = (files("trl") / "chat_templates" / f"{family.documented}.jinja").read_text()
    question = chat.prompt_messages("What is this?")
    answered = question + chat.answer_messages("A cup.")
    for messages, prompt in [(question, True), (answered, False), (answered + question, True)]:
        written = []
        for template in (family.template, original):
            text = processor.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=prompt, tokenize=False
            )
            written.append(text)
        assert written[0] == written[1]


def test_the_readme_names_every_family_of_the_committed_results():
    results = json.loads((ROOT / "results" / "families.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for name in [*results["families"], *results["not proven"]]:
        assert name in readme
    assert results["families"].keys() == FAMILIES.keys()
    assert results["not proven"].keys() == NOT_TRAINABLE.keys()
    for name, proven in results["families"].items():
        assert proven.keys() == results["properties"].keys(), name
