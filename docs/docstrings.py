"""An extension of griffe: docstrings, which are written to be read with `help`, as Markdown for the API reference."""

import re

import griffe

NAMES = r"[A-Za-z_*]\w*(?:, \w+)*"
SECTION = re.compile(r"(Args(?: of its methods)?|Returns|Raises|Source|Derivatives):(?: (.*))?")
ITEM = re.compile(rf"({NAMES}): (.*)")  # an argument and what is said of it
TERM = re.compile(rf"({NAMES})$")  # a name on a line of its own, explained below
DRAWN = re.compile(r"\S {2,}\S")  # columns: a mask, a table of choices


def markdown(text: str) -> str:
    """Sections begin with a bold word, and arguments are a list. Formulas, drawn masks and doctests stay as they are."""
    lines, result = text.splitlines(), []
    i, margin = 0, None  # margin: where the text of the current item is indented to, None outside of a list
    while i < len(lines):
        line = lines[i]
        indent, content = len(line) - len(line.lstrip()), line.strip()
        section = SECTION.fullmatch(line)
        item = ITEM.fullmatch(content) if content[:1].islower() or indent else None
        if line.startswith(">>> "):
            end = next((j for j in range(i, len(lines)) if not lines[j]), len(lines))
            result += ["", "```pycon", *lines[i:end], "```"]
            i, margin = end, None
            continue
        if section:
            result += ["", f"**{section[1]}:** {section[2] or ''}", *[""] * (not section[2])]
            margin = None
        elif item and indent in (0, 4) and (indent == 0 or margin == 8 or starts_list(lines[:i])):
            result += [*[""] * (margin is None), f"- `{item[1]}`: {item[2]}"]
            margin = indent + 4
        elif indent == 0 and TERM.fullmatch(line) and i + 1 < len(lines) and lines[i + 1].startswith("    "):
            result += [*[""] * (margin is None), f"- `{line}`: "]
            margin = 4
        elif margin is not None and content and indent >= margin:
            end = end_of_drawing(lines, i, margin)
            if end > i:
                drawn = [line[margin:] for line in lines[i:end]]
                result += ["", *[f"    {line}" for line in ["```text", *drawn, "```"]], ""]
                i = end
                continue
            result.append(f"    {content}")
        elif content and indent and in_section(result) and margin is None:
            result.append(line[4:] if line.startswith("    ") else line)
        else:
            if content and margin is not None:
                result.append("")
                margin = None
            result.append(line)
        i += 1
    return "\n".join(result)


def starts_list(before: list[str]) -> bool:
    """Whether what is indented below these lines are arguments: "Args:" or a sentence that ends with a colon."""
    return bool(before) and (before[-1].endswith(":") or before[-1].startswith("    ") and starts_list(before[:-1]))


def end_of_drawing(lines: list[str], begin: int, margin: int) -> int:
    """Where the columns end that begin in a line, `begin` if there are none: lines of columns, and what is indented below them."""
    end = begin
    while end < len(lines) and lines[end].startswith(" " * margin):
        if not (DRAWN.search(lines[end]) or end > begin and lines[end].startswith(" " * (margin + 1))):
            break
        end += 1
    return end


def in_section(result: list[str]) -> bool:
    """Whether the last paragraph that began without an indent is that of a section."""
    begun = [line for line in result if line and not line.startswith(" ")]
    return bool(begun) and begun[-1].startswith("**")


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj, **others):
        if obj.docstring and not obj.is_alias:
            obj.docstring.value = markdown(obj.docstring.value)
