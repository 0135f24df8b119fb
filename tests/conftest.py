"""Fixtures that several test files share, and the rule that tests marked `gpu` need a GPU."""

import contextlib
import os
import signal
import sys
from collections import defaultdict

# A thread that waits for others sleeps, and does not keep the core that they may need: on a busy machine, and with as many
# workers as cores, tests of two threads are several times as fast.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What torch.compile generated for another instruction set, under another ATEN_CPU_CAPABILITY, is no use: PyTorch 2.13 keeps
# its graphs by keys without it.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
# What tests start is no worker of pytest-xdist's, though it may be pytest.
os.environ.pop("PYTEST_XDIST_WORKER", None)

import pytest  # noqa: E402
import torch  # noqa: E402

with contextlib.suppress(ImportError):  # a GPU machine may have pytest alone
    from hypothesis import HealthCheck, settings

    # The same examples in every run, however long they take.
    unhurried = [HealthCheck.too_slow]
    settings.register_profile("reproducible", derandomize=True, deadline=None, database=None, suppress_health_check=unhurried)
    settings.load_profile("reproducible")

THREADS = torch.get_num_threads()

# A shell's background job ignores SIGINT, and so would what the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, metavar="N", help="at most N of each test's parameters, spread over all")


def pytest_itemcollected(item):
    """Of a test marked one_of(n), one case in n is always tested, spread so that each value of a parameter meets each other
    parameter's in turn; the rest belongs to the exhaustive tests."""
    if mark := item.get_closest_marker("one_of"):
        indices = (index_in(axis, item.callspec.params) for axis in item.iter_markers("parametrize"))
        if sum(indices) % mark.args[0]:
            item.add_marker(pytest.mark.exhaustive)


def index_in(axis: pytest.Mark, params: dict) -> int:
    """Which of the values of pytest.mark.parametrize these are."""
    names, values = axis.args
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    for i, value in enumerate(values):
        several = value.values if hasattr(value, "marks") else value if len(names) > 1 else (value,)
        if all(params[name] is part for name, part in zip(names, several)):
            return i
    raise AssertionError(f"{params} is none of {values}")


@pytest.hookimpl(trylast=True)  # after those that other options leave out
def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in items:
            if item.get_closest_marker("gpu"):  # not a keyword: so may a folder be named
                item.add_marker(skip)
    if (most := config.getoption("cases")) is not None:
        kept = spread(items, most)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def spread(items, most: int) -> set:
    """At most so many of each test's cases, the first and the last among them; skipped ones do not count."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("skip") is None:
            cases[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for every in cases.values():
        number = min(most, len(every))
        kept.update(every[i * (len(every) - 1) // max(number - 1, 1)] for i in range(number))
    return kept


@pytest.fixture(autouse=True)
def same_random_numbers():
    """What a test draws is the same in every run, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def launches_are_planned_anew():
    """What a test replaces in launchers is not kept for the next one."""
    yield
    if launch := sys.modules.get("fastgpt.kernels.launch"):
        launch.decided.cache_clear()


@pytest.fixture(autouse=True)
def number_of_threads(request):
    """One, since most models here are tiny; all in tests of operations, whose work is shared: those marked threads."""
    torch.set_num_threads(THREADS if "threads" in request.keywords else 1)
