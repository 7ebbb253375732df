"""DeepSpeed's ZeRO-3 in one process: a model's parameters are empty but while modules that own them, or have named them
to DeepSpeed, are in their forward or backward. Names and marks are DeepSpeed's.
"""

import enum
import sys
import types

import torch

OFFLOAD = "deepspeed.runtime.zero.parameter_offload"
Status = enum.Enum("Status", "AVAILABLE NOT_AVAILABLE INFLIGHT")


def timed(func):
    """As DeepSpeed's wrapper, which hides where a hook was written."""

    def wrapped(*args):
        return func(*args)

    wrapped.__module__ = "deepspeed.utils.nvtx"
    return wrapped


def make_whole(parameter):
    if parameter.ds_status is not Status.AVAILABLE:
        parameter.data = parameter.ds_values.clone()
        parameter.ds_status = Status.AVAILABLE


def cut(parameter):
    parameter.data, parameter.ds_status = torch.empty(0), Status.NOT_AVAILABLE


def name_external(module, parameter):
    module._external_params[id(parameter)] = parameter


class Zero3:
    """``model`` under ZeRO-3; ``release`` has to follow each backward."""

    def __init__(self, model, monkeypatch):
        self.running = []
        package, offload = types.ModuleType("deepspeed"), types.ModuleType(OFFLOAD)
        package.zero = types.SimpleNamespace(register_external_parameter=name_external)
        offload.FWD_MODULE_STACK = self.running
        monkeypatch.setitem(sys.modules, "deepspeed", package)
        monkeypatch.setitem(sys.modules, OFFLOAD, offload)
        self.parameters = list(model.parameters())
        for parameter in self.parameters:
            parameter.ds_values = parameter.data
            parameter.all_gather = lambda parameter=parameter: make_whole(parameter)
            cut(parameter)
        for module in model.modules():
            self._hook(module)

    def release(self):
        for parameter in self.parameters:
            cut(parameter)

    def _hook(self, module):
        module._external_params = {}

        def needed():
            own = [*module.parameters(recurse=False), *module._external_params.values()]
            return [parameter for parameter in own if hasattr(parameter, "ds_status")]

        def gather(*unused):
            for parameter in needed():
                make_whole(parameter)

        def before(module, args):
            self.running.append(module)
            gather()

        @timed
        def after(module, args, output):
            self.running.pop()
            of_others = {id(p) for other in self.running for p in other._external_params.values()}
            for parameter in needed():
                if id(parameter) not in of_others:
                    cut(parameter)

        def before_backward(module, args, output):
            if isinstance(output, torch.Tensor) and output.requires_grad:
                output.register_hook(gather)

        before.__module__ = before_backward.__module__ = OFFLOAD
        after.__closure__[0].cell_contents.__module__ = OFFLOAD
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        module.register_forward_hook(before_backward)
