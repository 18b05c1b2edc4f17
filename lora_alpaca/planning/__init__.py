"""Every automatic choice, and every check, before the first heavy step."""
