"""What a reward model reads of prompts and responses that are in the policy's tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rlhf_npu.data.conversations import Answer, Conversations, writes_alike
from rlhf_npu.data.encoding import Encoded, Encoder, Limits
from rlhf_npu.data.prompts import PromptSample
from tests.data.tokenizers_for_tests import CHATML, INST, LLAMA_3, byte_level, metaspace

POLICY = byte_level(CHATML, eos="<|im_end|>")
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is one plus two?"}]


def chat_sample(messages: list[dict[str, Any]] = MESSAGES) -> PromptSample:
    text = POLICY.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = POLICY(text, add_special_tokens=False)["input_ids"]
    return PromptSample(0, tuple(ids), text, "test", None, {}, messages=messages)


def answer(sample: PromptSample, text: str, finished: bool = True) -> Answer:
    ids = POLICY(text, add_special_tokens=False)["input_ids"]
    return Answer(sample, (*ids, POLICY.eos_token_id) if finished else tuple(ids), finished)


def whole_chat(tokenizer: PreTrainedTokenizerBase, response: str) -> Any:
    messages = [*MESSAGES, {"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]


def test_ids_are_passed_as_they_are_where_the_reward_model_writes_alike() -> None:
    reward_models = copy.deepcopy(POLICY)
    reward_models.pad_token = "<eos>"  # what is padded with does not matter
    conversations = Conversations(reward_models, POLICY)
    assert conversations.as_they_are
    whole, cut = answer(chat_sample(), "Three."), answer(chat_sample(), "Thr", finished=False)
    assert conversations.ids([whole, cut]) == [[*each.sample.prompt_ids, *each.token_ids] for each in (whole, cut)]


@pytest.mark.parametrize("other", [byte_level(LLAMA_3), byte_level(None), metaspace(), byte_level(CHATML)])
def test_another_template_vocabulary_or_eos_is_another_way_to_write(other: PreTrainedTokenizerBase) -> None:
    assert not writes_alike(other, POLICY)
    assert writes_alike(copy.deepcopy(other), other)


@pytest.mark.parametrize("template", [LLAMA_3, INST, CHATML])
def test_chats_go_through_the_reward_models_own_template(template: str) -> None:
    tokenizer = byte_level(template)
    answers = [answer(chat_sample(), "Three."), answer(chat_sample(), "It is three,  indeed", finished=False)]
    found = Conversations(tokenizer, POLICY).ids(answers)
    assert found == [whole_chat(tokenizer, "Three."), whole_chat(tokenizer, "It is three,  indeed")]


def test_what_main_reward_has_trained_is_read_at_the_eos() -> None:
    tokenizer = byte_level(CHATML + "{# another #}", eos="<|im_end|>")
    (ids,) = Conversations(tokenizer, POLICY, up_to_eos=True).ids([answer(chat_sample(), "Three.")])
    assert [*ids, *tokenizer("\n")["input_ids"]] == whole_chat(tokenizer, "Three.")
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("tokenizer", [metaspace(), byte_level(LLAMA_3)])
def test_texts_become_the_tokens_that_main_reward_trains_on(tokenizer: PreTrainedTokenizerBase) -> None:
    from rlhf_npu.data.drafts import Draft
    from rlhf_npu.data.turns import Piece

    prompt, response = "What is one plus two?", " It is three."
    encoder = Encoder(tokenizer, Limits(1000, False, "error"))
    (encoded,) = encoder.encode([Draft("a:1", prompt, ((Piece(response, True),),), is_chat=False)])
    assert isinstance(encoded, Encoded)
    assert encoded.example is not None
    (completion,) = encoded.example.completions
    trained_on = [*encoded.example.prompt.tolist(), *completion.input_ids.tolist()]
    sample = PromptSample(0, (1,), prompt, "test", None, {})
    whole, cut = Conversations(tokenizer, POLICY).ids([answer(sample, response), answer(sample, response, False)])
    assert whole == trained_on
    assert whole[-1] == tokenizer.eos_token_id
    assert cut == trained_on[:-1]


def test_chats_and_texts_keep_their_order_and_one_that_is_refused_says_why() -> None:
    refusing = "{% if m.content == 'No' %}{{ raise_exception('no') }}{% endif %}"
    strict = byte_level("{% for m in messages %}" + refusing + "{{ m.content }}{% endfor %}")
    text = PromptSample(0, (1,), "What? ", "test", None, {})
    answers = [answer(text, "a"), answer(chat_sample(), "No"), answer(chat_sample(), "Yes"), answer(text, "b")]
    first, refused, chat, last = Conversations(strict, POLICY).ids(answers)
    assert (strict.decode(first), strict.decode(last)) == ("What? a<eos>", "What? b<eos>")
    assert "the tokenizer's chat template refuses the messages" in str(refused)
    assert strict.decode(chat) == "Be brief.What is one plus two?Yes"
