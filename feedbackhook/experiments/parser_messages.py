"""The messages of jsonargparse in plain words."""

from __future__ import annotations

import re

from feedbackhook.experiments.config import one_line

_TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "<class 'list'>": "a list ([A, B])",
    "<class 'dict'>": "a mapping ({NAME: VALUE})",
    "<class 'NoneType'>": "null",
}


def plain_words(error: Exception) -> str:
    """Rewrite jsonargparse's message about a value of the wrong type without Python's types: the key, what it
    accepts, and the value given. Other messages are only put on one line."""
    message = one_line(error)
    match = re.fullmatch(r'(.*?)Parser key "([^"]*)": (.*?)(?:\. Got| Given) value: (.*)', message)
    if match is not None:
        before, key, expected, given = match.groups()
        kinds = re.findall(r"Expected a (<class '\w+'>|typing\.Literal\[[^]]*\])", expected)
        words = [_TYPES.get(kind, kind.removeprefix("typing.Literal").strip("[]")) for kind in kinds]
        if words:
            words = list(dict.fromkeys(word.replace(", '", " or '") for word in words))
            if re.fullmatch(r"[\w.:/+-]+", given):
                words = [word.replace("([A, B])", f"(such as [{given}])") for word in words]
            return f"{before}{key} must be {' or '.join(words)}, not {given}"
    match = re.search(r'Parser key "([^"]*)": Unable to load config \'(.*?)\'', message)
    if match is not None:
        return f"{match[1]} must be a mapping of settings ({{NAME: VALUE}}), not {match[2]}"
    return message
