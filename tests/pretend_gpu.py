"""A GPU for tests where there is none: tensors of the CPU that say they lie on cuda:0.

Run:      PYTHONPATH=tests pytest -p pretend_gpu tests/test_gpu.py
Refused:  an operation on tensors of both devices; in a recording, what would wait for the GPU or read the host.
Left out: its kernels and their rounding, time and memory; torch.compile; NCCL. Autocast is the CPU's.
"""

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
recording = []  # the graph that is being recorded


class OnGPU(Tensor):
    device, is_cuda, is_cpu = GPU, True, False

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if function in (Tensor.__getitem__, Tensor.__setitem__):  # indices may lie on the host, but for a recording
            lists = any(isinstance(x, list) for x in (args[1] if isinstance(args[1], tuple) else args[1:2]))
            assert not (lists and recording), "a list of indices, which is copied from the host"
            tensors = tensors if recording else [x for x in (args[0], *args[2:]) if isinstance(x, Tensor)]
        if (function != Tensor.copy_ or recording) and any(not isinstance(x, OnGPU) and x.dim() for x in tensors):
            raise RuntimeError(f"{function.__name__}: tensors of the GPU and of the host")
        result = super().__torch_function__(function, types, args, kwargs)
        return result.as_subclass(cls) if function == Tensor.grad.__get__ and result is not None else result

    def __reduce_ex__(self, protocol):  # what is saved may be loaded anywhere
        with torch._C.DisableTorchFunction():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **settings):
        raise TypeError("a tensor of the GPU has no numpy()")

    __array__ = numpy


class Devices(TorchFunctionMode):
    """Makes tensors where they are asked for, and moves them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (Tensor.to, Tensor.cpu):
            place, dtype = HOST, None
            if function == Tensor.to:
                place, dtype, *_ = torch._C._nn._parse_to(*args[1:], **{k: kwargs[k] for k in kwargs if k != "copy"})
            source, place = args[0].device, place or args[0].device
            assert source == place or not recording, "a copy between GPU and host in a recording"
            with torch._C.DisableTorchFunction():
                moved = args[0].to(dtype or args[0].dtype, copy=source != place or kwargs.get("copy", False))
                return moved.as_subclass(OnGPU if place.type == "cuda" else Tensor)
        if kwargs.get("device") is None or torch.device(kwargs["device"]).type != "cuda":
            return function(*args, **kwargs)
        assert function != torch.tensor or not recording, "a copy from the host in a recording"
        try:
            return function(*args, **kwargs | {"device": HOST}).as_subclass(OnGPU)
        except RuntimeError as error:
            if "can't allocate memory" in str(error):
                raise torch.cuda.OutOfMemoryError from None
            raise


class Graph(TorchDispatchMode):
    """A recording: the operations that were ordered, with nothing of Python's between, on the same memory each time.
    It is made by running them, and the first replay is that run."""
    WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::scalar_tensor",
             "aten::lift_fresh", "aten::equal", "aten::is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split(".")[0]
        assert name not in self.WAITS, name
        masks = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor) and x.dtype == torch.bool]
        assert not name.startswith("aten::index") or not masks, f"{name} by a mask, which waits to be counted"
        result = function(*args, **kwargs or {})
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def __enter__(self):
        self.calls, self.ran = [], True
        recording.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        recording.remove(self)
        return super().__exit__(*error)

    def replay(self):
        with torch._C.DisableTorchFunction():
            for function, args, kwargs, result in self.calls if not self.ran else []:
                for then, now in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                    if then.data_ptr() != now.data_ptr():
                        then.copy_(now)
        self.ran = False


class Autocast(torch.autocast):
    def __init__(self, device_type, *args, **settings):
        super().__init__(device_type.replace("cuda", "cpu"), *args, **settings)


def of_cpu(function):
    return lambda device_type: function(device_type.replace("cuda", "cpu"))


for name, answer in dict(is_available=True, device_count=1, current_device=0, set_device=None, synchronize=None,
                         empty_cache=None, is_bf16_supported=True, mem_get_info=(2**37, 2**37), max_memory_allocated=0,
                         reset_peak_memory_stats=None).items():
    setattr(torch.cuda, name, lambda *args, answer=answer, **settings: answer)
torch.cuda.CUDAGraph, torch.cuda.graph = Graph, lambda graph, **settings: graph
torch.autocast = torch.amp.autocast = Autocast
torch.is_autocast_enabled, torch.get_autocast_dtype = map(of_cpu, (torch.is_autocast_enabled, torch.get_autocast_dtype))
torch._has_compatible_shallow_copy_type = lambda *tensors: False  # a module that moves gets other parameters
torch.utils.checkpoint._allowed_determinism_checks_to_fns["default"] = lambda tensor: None  # it would ask for devices
Devices().__enter__()
