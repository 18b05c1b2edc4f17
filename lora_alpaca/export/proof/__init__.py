"""The proof that what was written answers as base + adapter does, and its receipt."""
