"""A pytest plugin for dry runs, `-p benchmarks.first_only`: only the first collected test runs."""


def pytest_collection_modifyitems(items):
    del items[1:]
