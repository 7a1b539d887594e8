"""How a patched network works: layers and their feedback weights, interception, the audit."""
