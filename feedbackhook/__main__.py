"""``python -m feedbackhook``."""

from feedbackhook.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
