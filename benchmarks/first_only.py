"""A pytest plugin for a dry run, `-p benchmarks.first_only`: of every test function, only the first case runs."""


def pytest_collection_modifyitems(items):
    first = {}
    for item in items:
        first.setdefault(getattr(item, "originalname", item.name), item)
    items[:] = first.values()
