"""train_drafter.py under FSDP without an accelerator, which accelerate itself does not offer: it is told that there is
one. Started by torchrun; prints what was sharded."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

os.environ |= {
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": os.environ.get("FSDP_VERSION", "2"),
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from drafttrain.train_drafter import main
from drafttrain.training.drafter_trainer import DrafterTrainer


def evaluate(self, *args, **kwargs):
    models = (self._unwrapped(), self.target.model)
    print("sharded:", *(type(model.get_decoder().layers[0]).__name__ for model in models), flush=True)
    return measured(self, *args, **kwargs)


PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
measured, DrafterTrainer.evaluate = DrafterTrainer.evaluate, evaluate
main([*sys.argv[1:], "--training.arguments.use_cpu", "false"])
