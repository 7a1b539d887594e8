"""What a patched module carries: one mark, two hooks, and what copies take along."""

from __future__ import annotations

from typing import Any, NoReturn, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from feedbackhook.core.errors import warn

MARK = "_feedbackhook"
_SCRIPT = "__prepare_scriptable__"  # torch.jit.script asks a module for it before anything else


class Owner(Protocol):
    """What marks call: the interceptor of a patch."""

    patch: Any

    def open(self, mark: Mark, module: nn.Module) -> None:
        """A marked module's forward is about to run."""

    def enter(
        self, mark: Mark, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A site's forward is about to run; return its new inputs, or None to keep them."""

    def close(self, module: nn.Module, inputs: object, output: object) -> None:
        """A marked module's forward has run, or has raised."""


class Link:
    """How the marks of one model find their interceptor.

    A mark belongs to its module, so copies and pickles of the module take it along. They must not take the
    whole model along, so a copied link forgets its owner. Only the root's mark carries the owner: a copy of
    the whole model is patched on its own, and a copy of a part is not patched.
    """

    def __init__(self, owner: Owner) -> None:
        self.owner: Owner | None = owner

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": None}


class Mark:
    """The mark on a patched module, or on an ancestor of one.

    Args:
        link: leads to the interceptor.
        path: full name of the module in the patched model.
        module: the module itself, which gets the hooks.
        site: whether its inputs are the site of a direct rule.

    Attributes:
        seen: functions called while this module was the innermost one, in forwards that passed the audit.
        audited: for an outermost module, the kinds of forward that have been audited: in training mode or
            not, with inputs that require a gradient or not.
    """

    def __init__(self, link: Link, path: str, module: nn.Module, site: bool = False) -> None:
        self.link = link
        self.path = path
        self.seen: set[Any] = set()
        self.audited: set[tuple[bool, bool]] = set()
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self.open, prepend=True),
            module.register_forward_hook(self.close, always_call=True, with_kwargs=True),
        ]
        if site:
            self._handles.append(module.register_forward_pre_hook(self.enter, with_kwargs=True))
        module.__dict__[MARK] = self
        module.__dict__[_SCRIPT] = refuse_script

    def __getstate__(self) -> dict[str, Any]:
        owner = self.link.owner if self.path == "" else None
        return {**self.__dict__, "seen": set(), "audited": set(), "owner": owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        owner = state.pop("owner")
        self.__dict__.update(state)
        if owner is not None:
            self.link.owner = owner

    def open(self, module: nn.Module, args: object) -> None:
        """The hook before the module's forward."""
        if (owner := self.link.owner) is not None:
            owner.open(self, module)
            return
        for part in module.modules():
            mark_of(part)
        if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            warn(
                f"this {type(module).__name__} is a copy of a part ({self.path!r}) of a patched model. Such "
                "copies are not patched, so its error signals are exact; feedbackhook.patch(...) patches it"
            )

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The hook that sees the inputs of a site."""
        owner = self.link.owner
        return None if owner is None else owner.enter(self, args, kwargs)

    def close(self, module: nn.Module, args: object, kwargs: object, output: object) -> None:
        """The hook after the module's forward, which also runs if the forward has raised."""
        if (owner := self.link.owner) is not None:
            owner.close(module, (args, kwargs), output)

    def take_off(self, module: nn.Module) -> None:
        """Remove hooks and attributes from the module."""
        for handle in self._handles:
            handle.remove()
        for name in (MARK, _SCRIPT):
            module.__dict__.pop(name, None)


def mark_of(module: nn.Module) -> Mark | None:
    """Return the module's mark. A mark that a copy of a part brought along is removed and does not count."""
    mark: Mark | None = module.__dict__.get(MARK)
    if mark is not None and mark.link.owner is None:
        mark.take_off(module)
        return None
    return mark


def refuse_script() -> NoReturn:
    """What torch.jit.script finds on a patched module."""
    raise RuntimeError(
        "torch.jit.script cannot compile a patched module, whose hooks are Python: remove the patch first "
        "(feedbackhook.unpatch(model)), or script an unpatched copy; torch.compile accepts a patched model"
    )
