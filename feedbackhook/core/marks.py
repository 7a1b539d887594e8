"""What a patched model's modules carry: one attribute and two hooks each, and the way that copies take."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from feedbackhook.core.interception import Bracket

MARK = "_feedbackhook"
_SCRIPT = "__prepare_scriptable__"  # torch.jit.script asks a module for it before anything else


class Link:
    """How the marks of one model find their bracket.

    A mark belongs to its module, so copies and pickles of the module take it along. They must not take the
    model along as well, hence a link forgets its bracket, and the root's mark alone carries it: a copy of the
    whole is patched on its own, and that of a part is not patched.
    """

    def __init__(self, bracket: Bracket) -> None:
        self.bracket: Bracket | None = bracket

    def __getstate__(self) -> dict[str, Any]:
        return {"bracket": None}


class Mark:
    """On a patched module or an ancestor of one.

    Args:
        link: to the bracket.
        path: the full name of the module in the patched model.
        module: the module itself, which gets the hooks.

    Attributes:
        seen: functions that were called while this module was the innermost, in forwards that passed the
            audit.
        audited: of an outermost module, the kinds of forward that have been audited: in training or not, with
            inputs that require a gradient or not.
    """

    def __init__(self, link: Link, path: str, module: nn.Module) -> None:
        self.link = link
        self.path = path
        self.seen: set[Any] = set()
        self.audited: set[tuple[bool, bool]] = set()
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self.open, prepend=True),
            module.register_forward_hook(self.close, always_call=True, with_kwargs=True),
        ]
        module.__dict__[MARK] = self
        module.__dict__[_SCRIPT] = refuse_script

    def __getstate__(self) -> dict[str, Any]:
        bracket = self.link.bracket if self.path == "" else None
        return {**self.__dict__, "seen": set(), "audited": set(), "bracket": bracket}

    def __setstate__(self, state: dict[str, Any]) -> None:
        bracket = state.pop("bracket")
        self.__dict__.update(state)
        if bracket is not None:
            self.link.bracket = bracket

    def open(self, module: nn.Module, args: object) -> None:
        """The hook before the module's forward."""
        if (bracket := self.link.bracket) is not None:
            bracket.open(self, module)
            return
        for part in module.modules():
            mark_of(part)
        if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            warn(
                f"this {type(module).__name__} copies a part ({self.path!r}) of a patched model. Copies "
                "of parts are not patched, so its error signals are exact; feedbackhook.patch patches it"
            )

    def close(self, module: nn.Module, args: object, kwargs: object, output: object) -> None:
        """The hook after it, also where it has raised."""
        if (bracket := self.link.bracket) is not None:
            bracket.close(module, (args, kwargs), output)

    def take_off(self, module: nn.Module) -> None:
        """Takes hooks and attributes from the module."""
        for handle in self._handles:
            handle.remove()
        for name in (MARK, _SCRIPT):
            module.__dict__.pop(name, None)


def mark_of(module: nn.Module) -> Mark | None:
    """The module's mark; one that a copy of a part has brought along is taken off, and counts as none."""
    mark: Mark | None = module.__dict__.get(MARK)
    if mark is not None and mark.link.bracket is None:
        mark.take_off(module)
        return None
    return mark


def refuse_script() -> NoReturn:
    """What torch.jit.script finds on a patched module."""
    raise RuntimeError(
        "torch.jit.script cannot compile a patched module, whose hooks are Python: remove the patch first "
        "(feedbackhook.unpatch(model)), or script an unpatched copy; torch.compile takes a patched model"
    )


def warn(message: str) -> None:
    """Warns from wherever outside this library and torch's own modules a forward was called."""
    depth, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        ("feedbackhook.", "torch.")
    ):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, stacklevel=depth)
