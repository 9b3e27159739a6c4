"""The fixtures are what the contracts of the tests say."""


def test_the_tokenizer_round_trips_any_text(tiny_tokenizer):
    text = "def f():\n\treturn 'Z\u00fcrich \u6771\u4eac'\r\n"
    assert tiny_tokenizer.decode(tiny_tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_chat_template_renders_tokens_of_their_own(tiny_tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    ids = tiny_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids[0] == tiny_tokenizer.bos_token_id
    assert tiny_tokenizer.decode(ids) == "<|bos|><|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"
    assert tiny_tokenizer.eos_token == "<|end|>" and ids.count(tiny_tokenizer.eos_token_id) == 2


def test_the_models_share_the_vocabulary_but_not_the_opinions(tiny_target, tiny_drafter, tiny_tokenizer):
    import torch

    ids = torch.tensor([tiny_tokenizer.encode("for index in range(10):")])
    p, q = (model(ids).logits.float().softmax(-1) for model in (tiny_target, tiny_drafter))
    assert p.shape == q.shape == (1, ids.shape[1], len(tiny_tokenizer))
    overlap = torch.minimum(p, q).sum(-1)
    assert (overlap < 0.95).all() and (overlap > 0.01).all()
