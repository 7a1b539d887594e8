"""What is kept on disk: rows of metrics and run folders."""
