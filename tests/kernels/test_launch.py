"""What is launched in a shorter way than Triton's is what Triton would launch."""

import contextlib
import os
import sys
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

if "TRITON_INTERPRET" in os.environ:
    pytest.skip("the interpreter launches otherwise", allow_module_level=True)

from fake_gpu import gpu, launched_kernels, launches, meta  # noqa: E402
from launcher_calls import calls  # noqa: E402
from triton import knobs  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction, compute_cache_key  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from fastgpt.kernels.launch import Constants, Kernel, Launch, kernel  # noqa: E402

NAMES = list(calls(3))


@pytest.fixture
def by_triton(monkeypatch):
    """The kernels that go Triton's way, in a list."""
    went, run = [], JITFunction.run

    def noted(self, *args, **options):
        went.append(self)
        return run(self, *args, **options)

    monkeypatch.setattr(JITFunction, "run", noted)
    return went


def test_every_launched_kernel_has_the_fast_launch_path():
    assert all(type(kernel) is Kernel for kernel in launched_kernels().values())


@pytest.mark.parametrize("name", NAMES)
def test_a_second_launch_is_as_triton_launched_the_first(name, by_triton):
    """The same compiled kernel, grid and arguments in their places; Triton has no part in it."""
    call = calls(3)[name]
    with launches() as found:
        call()
        went = len(by_triton)
        call()
    first, second = found[: len(found) // 2], found[len(found) // 2 :]
    assert went == len(by_triton) == len(first) == len(second)
    for a, b in zip(first, second):
        assert (a.kernel, a.variant, a.grid) == (b.kernel, b.variant, b.grid) and a.arguments.keys() == b.arguments.keys()
        for x, y in zip(a.arguments.values(), b.arguments.values()):
            if isinstance(x, torch.Tensor):
                dtype = torch.uint8 if y.dtype in Launch.BYTES else y.dtype  # the kernel gets its address
                assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), dtype)
            elif hasattr(x, "base"):
                assert (x.shape, x.strides, x.block_shape) == (y.shape, y.strides, y.block_shape)
            else:
                assert type(x) is type(y) and x == y


class Address:
    """Stands for a tensor."""

    def __init__(self, dtype, address):
        self.dtype, self.address = dtype, address

    def data_ptr(self):
        return self.address


INTEGERS = (0, 1, 2, 16, 17, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -1, -16, -(2**31), -(2**31) - 1, -(2**63))
POINTERS = [None, *(Address(dtype, at) for dtype in (torch.float16, torch.float32, torch.int8) for at in (0, 16, 8, 2))]


def changes(name, value):
    """Values that an argument could have instead."""
    if name.endswith("_ptr"):
        return POINTERS
    if name.endswith("_desc"):
        if value is None:
            return [None]
        shapes = value.block_shape, [1, 1, 16, 16]
        tensors = [meta(1, 1, 64, 64, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)]
        return [None, *(TensorDescriptor(x, [1, 1, 64, 64], [4096, 4096, 64, 1], shape) for x in tensors for shape in shapes)]
    if isinstance(value, bool):
        return [True, False]
    if name.startswith(("stride_", "n_")):  # always integers
        return INTEGERS
    return [*INTEGERS, None, 0.0, 1.0, 16.5, True]


def keys_of(launch, device, arguments, options):
    """Ours, and Triton's: of what it specializes, and of all options."""
    of = launched_kernels()[launch.kernel]
    _, known, _, _, binder = of.device_caches[device]
    _, specialization, rest = binder(**arguments, **options)
    constants = {name: arguments[name] for name in of.constant_names} | options  # which launches have as one object
    variable = {name: value for name, value in arguments.items() if name not in constants}
    return (of.bind(**variable)[0], *constants.items()), compute_cache_key(known, specialization, rest)


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_as_fine_as_tritons(name):
    """Of arguments that differ in one place from a launch's, or are all of a kind: where Triton would compile another kernel,
    the key is another one. And of a number's values it is no finer than twice as fine."""
    with launches() as found:
        calls(3)[name]()
        device = driver.active.get_current_device()
        for launch in {launch.kernel: launch for launch in found}.values():
            options = {key: launch.options[key] for key in ("num_warps", "num_stages", "enable_fp_fusion")}
            trials = [(launch.arguments, options)]
            trials += [(launch.arguments, options | {"num_warps": 8}), (launch.arguments, options | {"num_stages": 5})]
            trials += [(launch.arguments, options | {"maxnreg": 64}), (launch.arguments, options | {"enable_fp_fusion": None})]
            for argument, value in launch.arguments.items():
                for other in changes(argument, value):
                    trials.append((launch.arguments | {argument: other}, options))
            ours = {}
            for arguments, given in trials:
                key, tritons = keys_of(launch, device, arguments, given)
                assert ours.setdefault(key, tritons) == tritons, (arguments, given)
            assert len(ours) <= 2 * len(set(ours.values()))


def test_a_key_that_is_too_coarse_is_found(monkeypatch):
    """The fault that the test above is for, planted: no look at where a tensor starts."""
    of = launched_kernels()["norm_kernel"]
    bind = of.bind

    def coarse(x_ptr, *args, **named):
        return bind(Address(x_ptr.dtype, 0) if x_ptr is not None else None, *args, **named)

    monkeypatch.setattr(of, "bind", coarse)
    with pytest.raises(AssertionError):
        test_keys_are_as_fine_as_tritons("norm")


def test_every_launch_is_on_the_device_of_its_tensors():
    """Where another one is the current device, that of the tensors is entered for each launch, and left after it."""
    device, launched, get_device = torch.device("cuda:3"), [], torch.Tensor.get_device

    def tensor(*shape, strides=None, dtype=torch.float16):
        return meta(*shape, strides=strides, dtype=dtype).to(device)

    @contextlib.contextmanager
    def device_of(tensor):
        with mock.patch.object(driver.active, "device", tensor.get_device()):
            yield

    def run(self, *args, grid, warmup, **named):
        values = [getattr(x, "base", x) for x in (*args, *named.values())]
        assert driver.active.get_current_device() == 3
        assert {x.device for x in values if isinstance(x, torch.Tensor)} == {device}
        launched.append(self)

    with gpu(), mock.patch.object(torch.cuda, "device_of", device_of), mock.patch.object(JITFunction, "run", run):
        with mock.patch.object(torch.Tensor, "get_device", get_device):
            for call in calls(3, tensor).values():
                call()
        assert driver.active.get_current_device() != 3
    assert set(launched) == set(launched_kernels().values())


def test_the_current_device_is_not_entered_anew():
    with launches(), mock.patch.object(torch.cuda, "device_of", side_effect=AssertionError):
        calls(3)["norm"]()


def test_compiled_kernels_are_launched_on_their_device_only(by_triton):
    for _ in range(2):
        with launches() as found:
            calls(3)["norm"]()
    assert len(by_triton) == 2 and len(found) == 1


def test_hooked_launches_take_tritons_path(by_triton, monkeypatch):
    """So does one that is the first after a hook is gone, but no later one."""
    call, of = calls(3)["norm"], launched_kernels()["norm_kernel"]
    hook = lambda metadata: None  # noqa: E731
    with launches() as found:
        call()
        for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
            chain.add(hook)
            call()
            chain.remove(hook)
        monkeypatch.setattr(of, "pre_run_hooks", [lambda *args, **options: None])
        call()
        assert len(by_triton) == 4
        monkeypatch.setattr(of, "pre_run_hooks", [])
        call()
    assert len(by_triton) == 4 and len(found) == 5


def test_annotated_arguments_are_refused():
    def function(x_ptr, n: "i32"):  # noqa: F821
        pass

    with pytest.raises(TypeError, match="^n: expected an argument without an annotated type, got i32"):
        kernel()(function)


def test_arguments_after_constants_are_refused():
    def function(x_ptr, N: tl.constexpr, n):
        pass

    with pytest.raises(TypeError, match="^n: expected before all compile-time constants, got after N"):
        kernel()(function)


def test_constants_count_as_themselves():
    """Launches with others, though they are alike, go Triton's way once more, and find what it has compiled."""
    first, second = Constants(BLOCK=32), Constants(BLOCK=32)
    assert first == first != second and len({first, second}) == 2 and dict(first) == dict(second)


# Calls in front of the launches of a call, after the first: of functions of the package and Triton, and by these of others.
# Its time goes into them; python -m benchmarks.launches times it.
MOST = {
    "forward": 25, "forward, bias and mask": 29, "forward, packed": 31, "forward, pages": 21, "backward": 280,
    "decode": 23, "decode, pages": 23, "decode, new": 34, "update": 21, "linear": 15, "linear, rows": 17,
    "quantized": 15, "quantized, rows": 17, "quantized, many rows": 15, "norm": 17, "norm, strided": 15, "embed": 27,
    "advance": 13, "record_token": 13, "route": 23, "moe": 55, "moe, many rows": 83, "moe, quantized": 46,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_little_python_is_in_front_of_a_launch(name):
    call, counted = calls(3)[name], []

    def count(frame, event, function):
        path = frame.f_code.co_filename
        if event in ("call", "c_call") and ("fastgpt/kernels" in path or "triton" in path or path == "<string>"):  # binders
            counted.append(path)

    with launches():
        call()
        sys.setprofile(count)
        try:
            call()
        finally:
            sys.setprofile(None)
    assert len(counted) <= MOST[name]
