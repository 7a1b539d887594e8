"""How a patched network works: layers and their feedback weights, interception, the audit.

Who may import whom, from the bottom up. A file imports only from lines above its own, or from earlier in its
line:

    torch_internals, memory, operations, parts, angles   torch alone
    discovery, feedbackhook.rng, learning, feedback, projection, layer   a layer and its V, a site and its B
    state                                            what listeners subscribe to; knows `layer` alone
    errors, audit, weights, steps, by_hand, redraws, learners, signals, edge, guard   one concern each
    marks, mode, sites, coverage, calls, interception   hooks and function mode; nothing in `core` is above
    feedbackhook.rules, feedbackhook.selection       what the user chooses
    feedbackhook.measurement, feedbackhook.monitor   listeners
    feedbackhook.handle, feedbackhook.patching       the public functions

`tests/test_imports.py` checks it.
"""
