"""Models spread over devices: on a machine with none, by weights on disk and by stand-ins for two accelerators."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from drafttrain.config import TargetConfig
from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.errors import UserError
from drafttrain.evaluation.pair import Models
from drafttrain.models.loading import load_target
from drafttrain.ops.sampling import Sampling
from tests.conftest import build_llama
from tests.ops.test_attention import build

PROMPTS = [[1, 5, 3], [2], [7, 8, 9, 10, 11, 3, 4]]
PLACES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("target")
    build_llama(len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def offloaded(saved, *places: str):
    """The saved target, the weights of some places on disk."""
    device_map = {place: "disk" if place in places else "cpu" for place in PLACES}
    return load_target(TargetConfig(path=str(saved), device_map=device_map))


@pytest.mark.parametrize("places", [("model.layers.1", "lm_head"), PLACES[:3], PLACES])
@pytest.mark.parametrize("drafts", [False, True])
def test_a_target_whose_weights_are_partly_on_disk_decodes_as_it_does_in_memory(saved, places, drafts):
    whole, spread = load_target(TargetConfig(path=str(saved))).model, offloaded(saved, *places).model
    assert any(weight.is_meta for weight in spread.parameters())
    small = build_llama(whole.config.vocab_size, layers=1, seed=0)
    texts = []
    for model in (whole, spread):
        drafter = ModelDrafter(Engine(small), 3) if drafts else None
        found = Decoder(Engine(model).checked(), drafter, Sampling(0.0)).generate(PROMPTS, [9, 3, 12])
        texts.append([completion.token_ids for completion in found])
    assert texts[0] == texts[1]


def test_a_copy_of_a_target_that_is_partly_on_disk_is_refused_in_a_sentence(saved):
    target = offloaded(saved, "model.layers.1")
    models = Models(target, load_target(TargetConfig(path=str(saved))), {}, frozenset(), "float32")
    with pytest.raises(UserError, match=r"partly offloaded .* cannot be run in float64"):
        models.engines("float64")


class Places(TorchFunctionMode):
    """Stands in for accelerators: every tensor is on the CPU but knows a place, and places do not mix."""

    CPU = torch.device("cpu")

    def of(self, tensor: torch.Tensor) -> torch.device:
        return vars(tensor).get("place", self.CPU)

    def put(self, result: object, place: torch.device) -> object:
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                tensor.place = place
        return result

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if function == torch.Tensor.device.__get__:
            return self.of(args[0])
        wanted = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if function is torch.Tensor.to and isinstance(args[-1], str | torch.device):
            wanted, args = torch.device(args[-1]), (args[0], self.CPU)
        kwargs.pop("pin_memory", None)  # which needs an accelerator
        if "device" in kwargs:
            kwargs["device"] = self.CPU
        if wanted is not None:
            return self.put(function(*args, **kwargs).clone(), wanted)
        places = {self.of(tensor) for tensor in tensors if tensor.dim()}
        if len(places) > 1 and function is not torch.Tensor.copy_:
            raise RuntimeError(f"{function.__name__} of tensors on {sorted(map(str, places))}")
        result = function(*args, **kwargs)
        return self.put(result, self.of(tensors[0])) if tensors else result


def split(model: torch.nn.Module, places: Places) -> torch.nn.Module:
    """The first half of a model on one accelerator, the rest on another, under accelerate's hooks."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # a tied one has a copy on each
    parts = ["embed_tokens", "rotary_emb", "layers.0", "layers.1", "layers.2", "norm"]
    for number, part in enumerate([*map(model.model.get_submodule, parts), model.lm_head]):
        device = torch.device("cuda", number // 4)
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.place = device
        add_hook_to_module(part, AlignDevicesHook(execution_device=device, place_submodules=False, offload=False))
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.place = device
    model.hf_device_map = {}
    return model


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3"])
def test_a_target_on_two_devices_gives_its_logits_and_never_mixes_devices(name):
    tokens = [torch.arange(12).reshape(3, 4), torch.arange(3).reshape(3, 1)]
    logits = []
    for spread in (False, True):
        model = build(name)
        with Places() if spread else nullcontext() as places, torch.inference_mode():
            engine = Engine(split(model, places) if spread else model)
            cache = engine.new_cache(3)
            engine.read(cache, [[1, 2, 3], [4], [5, 6]])
            found = []
            for block in tokens:
                output = engine.forward(cache, block.to(engine.device))
                assert output.logits.device == output.hidden.device == engine.device
                cache.rollback([7, 2, 5])
                found.append(output.logits)
            cache.keep([0, 2])
            found.append(engine.forward(cache, tokens[1][:2].to(engine.device)).logits)
            kept = {layer.keys.device for layer in cache.layers}
            assert kept == ({torch.device("cuda", 0), torch.device("cuda", 1)} if spread else {Places.CPU})
        logits.append(found)
    assert all(torch.equal(*pair) for pair in zip(*logits, strict=True))


def test_tensors_on_two_devices_are_noticed():
    """Negative control for the test above."""
    with Places():
        left, right = (torch.zeros(2, device=f"cuda:{number}") for number in (0, 1))
        with pytest.raises(RuntimeError, match=r"cuda:0.*cuda:1"):
            left + right
        assert (left + right.to("cuda:0")).device == torch.device("cuda", 0)
