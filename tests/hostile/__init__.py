"""What hostile folders do to us, and what links beside and in our folders lead to: nothing."""
