"""The instruction sets that tests run again at."""

import fastgpt


def lower_levels() -> list[str]:
    """The CPU levels below the one that this process runs."""
    info = fastgpt.build_info()
    return info["cpu_levels"][: info["cpu_levels"].index(info["cpu_level"])]
